#!/bin/bash
# Builds the package for Debian on arm64 (for example for a Raspberry Pi with a 64-bit system), and runs tests
# with Debian's R for arm64, emulated. Run as root, on Debian for amd64:
#
#   tools/arm64.sh [--roots=DIR] [--mirror=URL] [--suite=SUITE] [build | TEST]...
#
# First makes the binary package rustcluster_VERSION_R_aarch64.tar.gz in the current folder: R CMD INSTALL
# installs it on a machine with the R of this release of Debian (default: trixie, R 4.5; bookworm: R 4.2). A
# cross compiler compiles it, since the emulator would take hours. Then runs the tests. TEST is one of the files
# in tests/testthat, as "nodes" for test-nodes.R; "build" runs no tests; the default, plain-codec and broadcast,
# takes about ten minutes. Makes two systems in DIR (default: roots, beside the checkout), once, and keeps them:
# SUITE-cross, which compiles, and SUITE-arm64.
set -euo pipefail
into=$PWD
cd "$(dirname "$0")/.."
. tools/install.sh
. tools/roots.sh

take_options "$@"
suite=trixie tests=()
for argument in "${rest[@]}"; do
  case $argument in
    --suite=?*) suite=${argument#*=} ;;
    -*) usage ;;
    *) tests+=("$argument") ;;
  esac
done
[ ${#tests[@]} != 0 ] || tests=(plain-codec broadcast)

take_root
need_packages iproute2 mmdebstrap arch-test qemu-user-static binfmt-support
command -v cargo >/dev/null || need_packages cargo
# A container may not have this mounted.
if ! [ -e /proc/sys/fs/binfmt_misc/register ]; then
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
fi
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

# Debian 12 has a newer Rust in separate packages.
case $suite in
  bookworm) rust="rustc-web cargo-web libstd-rust-web-dev:arm64" ;;
  *) rust="rustc cargo libstd-rust-dev:arm64" ;;
esac
# shellcheck disable=SC2086
make_root "$roots/$suite-cross" "$suite" amd64,arm64 "$mirror" r-base-core r-base-dev r-cran-cli \
  xz-utils gcc-aarch64-linux-gnu libc6-dev-arm64-cross $rust
cargo fetch --quiet --locked --manifest-path src/rust/Cargo.toml
began=$SECONDS
copy_checkout "$roots/$suite-cross/srv/rustcluster"
inside "$roots/$suite-cross" bash /srv/rustcluster/tools/cross-build.sh
package=$(cd "$roots/$suite-cross/srv" && ls rustcluster_*_R_aarch64.tar.gz)
mv "$roots/$suite-cross/srv/$package" "$into/"
echo "made $into/$package ($((SECONDS - began)) s)"
[ "${tests[*]}" != build ] || exit 0

root=$roots/$suite-arm64
make_root "$root" "$suite" arm64 "$mirror" r-base-core r-cran-testthat r-cran-cli procps iproute2 \
  openssh-server openssh-client
began=$SECONDS
copy_checkout "$root/srv/rustcluster"
cp "$into/$package" "$root/srv/"
# The time limits of tests are too short for an emulator.
inside "$root" env RUSTCLUSTER_TEST_SLACK=60 RUSTCLUSTER_TEST_JOBS=1 bash -euc '
  mkdir /tmp/library
  R CMD INSTALL --library=/tmp/library "/srv/$1" >/tmp/install.log 2>&1 || { cat /tmp/install.log; exit 1; }
  shift
  cd /srv/rustcluster
  export R_LIBS=/tmp/library
  Rscript -e "cat(R.version.string, R.version\$platform, \"\\n\")"
  status=0
  Rscript tools/run-tests.R /tmp/summary "$@" || status=$?
  cat /tmp/summary
  exit $status
' bash "$package" "${tests[@]}" || status=$?
echo "tests: $((SECONDS - began)) s"
exit "${status:-0}"
