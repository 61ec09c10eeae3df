#!/bin/sh
# SeaweedFS in one process, of which only the S3 gateway (which asks for keys) is reached from other containers: its
# master, volume server and filer ask for none, so they stay on this container's loopback. Makes the buckets $S3_BUCKETS.
set -eu
weed server -dir=/data -ip=127.0.0.1 -ip.bind=127.0.0.1 -volume.max=0 \
  -s3 -s3.ip.bind=0.0.0.0 -s3.port=8333 -s3.port.iceberg=0 -s3.port.lance=0 &
server=$!
trap 'kill -TERM $server' TERM INT
make_buckets() {
  for bucket in $S3_BUCKETS; do echo "s3.bucket.create -name $bucket"; done
  echo "s3.bucket.list"
}
until listed=$(make_buckets | weed shell -master=127.0.0.1:9333 2>/dev/null) && [ -n "$listed" ]; do
  kill -0 $server  # ends this script where the server has ended
  sleep 1
done
echo "$listed"
wait $server
