# A small Valkey from Debian's package, for tests where upstream's image cannot be pulled.
FROM debian:trixie-slim
RUN apt-get update -qq && apt-get install -qq -y --no-install-recommends valkey-server valkey-tools && rm -rf /var/lib/apt/lists/*
USER 999:999
