#!/bin/bash
# sbatch docs/cluster/slurm.sh: 4 nodes of 8 GPUs. Words of the run stand in the last line.
#SBATCH --job-name=seqzoo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?}"
. .venv/bin/activate
RUN=${RUN:-/shared/runs/mine}   # seen by all nodes
export OMP_NUM_THREADS=8 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# two minutes before the time is over every torchrun gets SIGTERM, and so do its processes: they save and leave
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$FIRST:29500" \
  train.py parallel=fsdp "run_dir=$RUN" trainer.resume=auto trainer.precision=bf16 "$@"
STATUS=$?

# a run that has ended writes its closing record; one that was stopped goes on later
if [ "$STATUS" -ne 0 ] && ! grep -q '"split": "final"' "$RUN/metrics.jsonl"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
