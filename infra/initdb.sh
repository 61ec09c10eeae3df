#!/bin/sh
# Run by Postgres at its first start: a database and a user each for Prefect and MLflow, no rights on the other's.
set -eu
for name in prefect mlflow; do
  variable=$(echo "${name}_DB_PASSWORD" | tr '[:lower:]' '[:upper:]')
  psql --set=ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
    --set=name="$name" --set=variable="$variable" <<'SQL'
\getenv password :variable
CREATE USER :"name" PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
psql --set=ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname prefect --command "CREATE EXTENSION IF NOT EXISTS pg_trgm"
