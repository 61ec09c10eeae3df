#!/bin/sh
# SeaweedFS in one process, of which only the S3 gateway (which asks for keys) is reached from other containers: its
# master, volume server and filer ask for none, so they stay on this container's loopback. Makes the buckets $S3_BUCKETS.
set -eu
identities=/dev/shm/identities.json  # in memory; given by environment variables, the access key would be logged
(umask 077; printf '{"identities": [{"name": "repae", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "%s", "secretKey": "%s"}]}]}' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" > $identities)
unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
weed server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -volume.max=0 \
  -s3 -s3.ip.bind=0.0.0.0 -s3.port=8333 -s3.config=$identities -s3.port.iceberg=0 -s3.port.lance=0 &
server=$!
trap 'kill -TERM $server' TERM INT
shell() { weed shell -master=127.0.0.1:9333 2>/dev/null; }
until listed=$(echo "s3.bucket.list" | shell); do
  kill -0 $server  # ends this script where the server has ended
  sleep 1
done
for bucket in $S3_BUCKETS; do
  case "$listed" in *"$bucket"*) ;; *) echo "s3.bucket.create -name $bucket" | shell ;; esac
done
wait $server
