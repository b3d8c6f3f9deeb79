# Plain instructions, for any builder.
#
#   docker build -t redis-migration .
#
# Another base: --build-arg BUILDER=… (Rust 1.90 or newer, glibc) and --build-arg RUNTIME=…
# (that glibc or a newer one, libgcc_s, CA certificates). A binary that is built already: an image
# that has it at /src/target/release/redis-migration, as --build-arg BINARY=….
ARG BUILDER=docker.io/library/rust:1.90-slim-bookworm
ARG RUNTIME=gcr.io/distroless/cc-debian12:nonroot
ARG BINARY=build

FROM ${BUILDER} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked --package redis-migration --bin redis-migration \
    && strip --strip-debug target/release/redis-migration

FROM ${BINARY} AS binary

FROM ${RUNTIME}
LABEL org.opencontainers.image.title="redis-migration" \
      org.opencontainers.image.description="Moves a live Redis or Valkey to another server or cluster" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=binary /src/target/release/redis-migration /usr/local/bin/redis-migration
# By number, which runAsNonRoot can check. Nothing is written outside --data-dir.
USER 65532:65532
WORKDIR /
EXPOSE 9320
ENTRYPOINT ["/usr/local/bin/redis-migration"]
