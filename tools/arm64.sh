#!/bin/bash
# Builds the package for Debian on arm64 (a Raspberry Pi with a 64-bit system, say), and runs tests with
# Debian's R for arm64, emulated. As root, on Debian for amd64:
#
#   tools/arm64.sh [--roots=DIR] [--mirror=URL] [--suite=SUITE] [build | TEST]...
#
# First the binary package rustcluster_VERSION_R_aarch64.tar.gz is made, in the current folder: R CMD
# INSTALL installs it on a machine with the R of this release of Debian (default: trixie, R 4.5;
# bookworm: R 4.2). It is compiled by a cross compiler, as compiling in the emulator would take hours.
# Then the tests are run: TEST is one of the files in tests/testthat, as "nodes" for test-nodes.R;
# "build": none; default: plain and payload, which takes about ten minutes. Two systems are made in DIR (default: roots,
# beside the checkout), once, and kept: SUITE-cross, which compiles, and SUITE-arm64.
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
[ ${#tests[@]} != 0 ] || tests=(plain payload)

take_root
need_packages iproute2 mmdebstrap arch-test qemu-user-static binfmt-support
command -v cargo >/dev/null || need_packages cargo
# In a container nobody may have done that.
if ! [ -e /proc/sys/fs/binfmt_misc/register ]; then
  mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
fi
[ -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ] || update-binfmts --enable qemu-aarch64

# Debian 12 has a Rust that is new enough beside its own.
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
# Time limits are for machines that run at their own speed.
inside "$root" env RUSTCLUSTER_TEST_SLACK=60 bash -euc '
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
