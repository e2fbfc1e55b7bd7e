#!/bin/bash
# Runs tests of the binary package for arm64 (tools/binary.sh arm64), which it makes first, with Debian's R for
# arm64, emulated. Run as root, on Debian for amd64:
#
#   tools/arm64.sh [--roots=DIR] [--mirror=URL] [--suite=SUITE] [TEST]...
#
# TEST is one of the files in tests/testthat, as "nodes" for test-nodes.R. The default, plain-codec and broadcast,
# takes about ten minutes. The options are those of tools/binary.sh.
set -euo pipefail
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
root=$roots/$suite-arm64
work=$(mktemp -d)
trap 'rm -rf "$work" "$root/srv/package"' EXIT
(cd "$work" && "$OLDPWD/tools/binary.sh" arm64 --suite="$suite" --roots="$roots" --mirror="$mirror")
add_packages "$root" r-cran-testthat procps iproute2 openssh-server openssh-client
began=$SECONDS
copy_checkout "$root/srv/rustcluster"
mkdir "$root/srv/package"
mv "$work"/rustcluster_*.tar.gz "$root/srv/package/"
# The time limits of tests are too short for an emulator.
inside "$root" env RUSTCLUSTER_TEST_SLACK=60 RUSTCLUSTER_TEST_JOBS=1 bash -euc '
  mkdir /tmp/library
  R CMD INSTALL --library=/tmp/library /srv/package/* >/tmp/install.log 2>&1 || { cat /tmp/install.log; exit 1; }
  cd /srv/rustcluster
  export R_LIBS=/tmp/library
  Rscript -e "cat(R.version.string, R.version\$platform, \"\\n\")"
  status=0
  Rscript tools/run-tests.R /tmp/summary "$@" || status=$?
  cat /tmp/summary
  exit $status
' bash "${tests[@]}" || status=$?
echo "tests: $((SECONDS - began)) s"
exit "${status:-0}"
