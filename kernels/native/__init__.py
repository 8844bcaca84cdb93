from seqzoo.kernels.native.build import BuildError, available, library, usable
