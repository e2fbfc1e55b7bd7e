#!/bin/bash
# Makes a binary package in the current folder, rustcluster_VERSION_RX.Y_PLATFORM.tar.gz, which R CMD INSTALL
# installs where there is no Rust and no compiler:
#
#   tools/binary.sh
#   tools/binary.sh arm64 [--suite=SUITE] [--roots=DIR] [--mirror=URL]
#
# The first form makes it for the R and the architecture of this machine. The second form cross-compiles it for
# Debian's R for arm64, as on a Raspberry Pi: run it as root, on Debian for amd64. SUITE is the release of Debian
# (default: trixie, R 4.5; bookworm: R 4.2). Makes two systems in DIR (default: roots, beside the checkout), once,
# and keeps them: SUITE-cross, which compiles, and SUITE-arm64, which is emulated.
#
# The package is installed, and computes with two workers, before it is put into the folder.
set -euo pipefail
into=$PWD
cd "$(dirname "$0")/.."
. tools/install.sh
. tools/roots.sh

take_options "$@"
arch='' suite=trixie
for argument in "${rest[@]}"; do
  case $argument in
    --suite=?*) suite=${argument#*=} ;;
    arm64) arch=arm64 ;;
    *) usage ;;
  esac
done
if [ -z "$arch" ] && [ $# != 0 ]; then usage; fi

# Runs a command in a process group of its own, which ends with this script.
run() {
  set -m
  "$@" </dev/null &
  set +m
  group=$!
  wait "$group"
  group=''
}

group='' work='' emulated='' part=''
trap '
  [ -z "$group" ] || { kill -KILL -- "-$group"; wait "$group"; } 2>/dev/null || true
  rm -rf "$work" "$emulated" "$part"
' EXIT
if [ -z "$arch" ]; then
  type R gcc make xz >/dev/null 2>&1 || need_packages r-base-core r-base-dev xz-utils
  Rscript --vanilla -e 'quit(status = !requireNamespace("cli", quietly = TRUE))' || need_packages r-cran-cli
  need_rust
  # Help pages contain the path of their source: that of a copy, which also leaves the checkout as it is.
  work=$(mktemp -d)
  # R that is killed leaves its temporary folder.
  export TMPDIR=$work
  mkdir "$work/rustcluster"
  tar c --exclude=./.git --exclude=./src/rust/target . | tar x -C "$work/rustcluster"
  run "$work/rustcluster/tools/build-binary.sh" "$work"
  built=$(echo "$work"/rustcluster_*.tar.gz)
  run tools/try-binary.sh "$built"
else
  if [ "$(uname -m)" != x86_64 ]; then
    echo "this machine cannot cross-compile for arm64; on a machine for arm64: tools/binary.sh" >&2
    exit 1
  fi
  take_root
  need_arm64
  # Debian 12 has a newer Rust in separate packages.
  case $suite in
    bookworm) rust="rustc-web cargo-web libstd-rust-web-dev:arm64" ;;
    *) rust="rustc cargo libstd-rust-dev:arm64" ;;
  esac
  # shellcheck disable=SC2086
  make_root "$roots/$suite-cross" "$suite" amd64,arm64 "$mirror" r-base-core r-base-dev r-cran-cli \
    xz-utils gcc-aarch64-linux-gnu libc6-dev-arm64-cross $rust
  make_root "$roots/$suite-arm64" "$suite" arm64 "$mirror" r-base-core r-cran-cli
  cargo fetch --quiet --locked --manifest-path src/rust/Cargo.toml
  copy_checkout "$roots/$suite-cross/srv/rustcluster"
  work=$roots/$suite-cross/srv/package
  rm -rf "$work"
  mkdir "$work"
  run inside "$roots/$suite-cross" /srv/rustcluster/tools/build-binary.sh /srv/package arm64
  built=$(echo "$work"/*.tar.gz)
  emulated=$roots/$suite-arm64/srv/package
  rm -rf "$emulated"
  mkdir "$emulated"
  cp tools/try-binary.sh "$built" "$emulated/"
  run inside "$roots/$suite-arm64" /srv/package/try-binary.sh "/srv/package/$(basename "$built")"
fi
# Nobody sees a part of the file.
package=$into/$(basename "$built")
part=$package.part
cp "$built" "$part"
mv -f "$part" "$package"
echo "made $package"
