"""What all Triton backends share: starting a kernel, its tuned configurations, and what a compiler makes of it."""

from seqzoo.kernels.gpu.launch import Launch, interpreted, launch, needs_gpu, products, recording, takes, usable
from seqzoo.kernels.gpu.tables import arch, for_arch, tuned
