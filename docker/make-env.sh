#!/bin/sh
# Writes docker/.env from docker/env.example: random secrets, the folder of documents, the profile. Readable by you only.
#
#   docker/make-env.sh /srv/documents
#
# An existing .env is never touched: Postgres keeps the password of its first start.
set -eu

if [ $# -ne 1 ] || [ ! -d "$1" ]; then
  echo "usage: $0 FOLDER_OF_DOCUMENTS (a folder that exists)" >&2
  exit 2
fi
documents=$(cd "$1" && pwd)
cd "$(dirname "$0")"
if [ -e .env ]; then
  echo "docker/.env exists already and is left as it is; remove it to make another." >&2
  exit 1
fi

profile=cpu-only
if command -v nvidia-smi > /dev/null && nvidia-smi > /dev/null 2>&1; then
  profile=gpu
fi

umask 077
trap 'rm -f .env.part' EXIT
while IFS= read -r line; do
  case $line in
    POSTGRES_PASSWORD= | REDIS_PASSWORD= | QDRANT_API_KEY= | BALLAST_WEBHOOK_SECRET_DOCUMENTS=)
      secret=$(openssl rand -hex 32)
      printf '%s%s\n' "$line" "$secret"
      ;;
    PREFECT_API_AUTH_STRING=)
      secret=$(openssl rand -hex 32)
      printf '%sadmin:%s\n' "$line" "$secret"
      ;;
    # In single quotes, where Compose takes every character as it is.
    BALLAST_DOCUMENTS=) printf "%s'%s'\n" "$line" "$documents" ;;
    COMPOSE_PROFILES=) printf '%s%s\n' "$line" "$profile" ;;
    *) printf '%s\n' "$line" ;;
  esac
done < env.example > .env.part
mv .env.part .env
echo "docker/.env is written, profile $profile. Prefect's UI will ask for the value of PREFECT_API_AUTH_STRING."
