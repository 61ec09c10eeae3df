#!/bin/sh
# SeaweedFS, of which only the S3 gateway (which asks for keys) is reached from other containers: its master, volume
# server and filer ask for none, so they stay on this container's loopback. The gateway comes last, when the filer
# answers and the buckets $S3_BUCKETS are there: before, it would call what it cannot reach yet "not found".
set -eu
identities=/dev/shm/identities.json  # in memory; given by environment variables, the access key would be logged
(umask 077; printf '{"identities": [{"name": "repae", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "%s", "secretKey": "%s"}]}]}' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" > $identities)
unset AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
shell() { weed shell -master=127.0.0.1:9333 2>/dev/null; }

# Volumes of 512 MB: with SeaweedFS's 30 GB a disk has room for one or two, and each bucket needs its own.
weed server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -volume.max=0 -master.volumeSizeLimitMB=512 -filer &
server=$!
trap 'kill -TERM $server' TERM INT
until listed=$(echo "s3.bucket.list" | shell); do
  kill -0 $server  # ends this script where the server has ended
  sleep 1
done
for bucket in $S3_BUCKETS; do
  case "$listed" in *"$bucket"*) ;; *) echo "s3.bucket.create -name $bucket" | shell ;; esac
done

weed s3 -filer=127.0.0.1:8888 -ip.bind=0.0.0.0 -port=8333 -port.iceberg=0 -port.lance=0 -config=$identities &
gateway=$!
trap 'kill -TERM $gateway $server' TERM INT
while kill -0 $server && kill -0 $gateway; do sleep 1; done
exit 1
