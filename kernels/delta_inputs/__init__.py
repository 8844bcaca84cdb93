from seqzoo.kernels.delta_inputs.op import DeltaInputs, delta_inputs
