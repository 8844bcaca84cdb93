"""Text in, batches out: sources of documents, tokenizers, packing. Knows torch; heavy libraries when first used."""
