#!/usr/bin/env bash
# Several nodes without a scheduler; run the same command on each of them:
#   NODES=2 MASTER=node0 bash launch/torchrun.sh recipe=pi model=llama2_7b ...
# MASTER: one of the nodes, host or host:port. PROCESSES: ranks per node; default: its number of GPUs.
# ADDRESS: this node's own address, if its host name resolves to another one (several networks).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${NODES:?NODES=2: how many nodes}" "${MASTER:?MASTER=node0: one of the nodes}"
case $MASTER in *:*) endpoint=$MASTER ;; *) endpoint=$MASTER:29400 ;; esac
own=()
if [ -n "${ADDRESS:-}" ]; then
  [ "$ADDRESS" = "${endpoint%:*}" ] && host=1 || host=0
  own=(--local_addr "$ADDRESS" --rdzv_conf "is_host=$host")
fi
exec python -m torch.distributed.run --nnodes "$NODES" --nproc_per_node "${PROCESSES:-auto}" \
  --rdzv_backend c10d --rdzv_endpoint "$endpoint" --rdzv_id "${RUN:-longctx}" "${own[@]}" \
  --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 train.py "$@"
