#!/bin/sh
# Ray head (`ray-node.sh head`) or worker (`ray-node.sh worker`), in the foreground.
set -eu
common="--block --disable-usage-stats --object-store-memory=${RAY_OBJECT_STORE_BYTES:-200000000}"
if [ "$1" = head ]; then
  exec ray start --head --port=6379 --num-cpus=0 --dashboard-host=127.0.0.1 $common
fi
exec ray start --address="$RAY_ADDRESS" --num-cpus="${RAY_CPUS:-1}" $common
