#!/bin/sh
# Prefect worker whose flow runs drive Ray: a driver must be on a node of the Ray cluster, so this one joins without CPUs.
set -eu
join_ray() {  # again whenever the node ends, as it does when the head was started anew
  while :; do
    ray start --address="$RAY_ADDRESS" --num-cpus=0 --object-store-memory="${RAY_OBJECT_STORE_BYTES:-200000000}" \
      --block --disable-usage-stats || true
    sleep 3
  done
}
join_ray &
repae deploy
exec prefect worker start --pool repae --type process --with-healthcheck
