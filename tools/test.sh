#!/bin/bash
# Installs what the tests need, and runs all of them. The last line is that of the R tests:
# "N passed, N failed, N skipped". RUSTCLUSTER_LONG_TESTS=1 runs the long ones too.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh

began=$SECONDS
step() {
  echo "== $* ($((SECONDS - began)) s)"
}

step "what the tests need"
need_packages r-base-core r-base-dev r-cran-testthat r-cran-roxygen2 r-cran-knitr \
  r-cran-rmarkdown r-cran-parallelly r-cran-cli openssh-server pandoc procps xz-utils devscripts qpdf \
  r-cran-foreach r-cran-iterators r-cran-doparallel r-cran-dorng r-cran-snow r-cran-dosnow r-cran-pbapply r-cran-future \
  r-cran-future.apply r-cran-furrr r-cran-progressr r-cran-later r-cran-promises \
  r-cran-data.table r-cran-dqrng r-cran-ff
# Packages that take a cluster, programs that embed R, and a browser.
if [ -n "${RUSTCLUSTER_LONG_TESTS:-}" ]; then
  need_packages r-cran-boot r-cran-caret r-cran-deoptim r-cran-lme4 r-cran-metafor r-cran-mgcv \
    r-cran-pbkrtest r-cran-shiny r-cran-vegan python3-rpy2 python3-jupyter-client r-cran-irkernel
  # Not on Ubuntu, which has it as a snap; the test is skipped then.
  if apt-cache show chromium-driver >/dev/null 2>&1; then
    need_packages chromium chromium-driver python3-selenium
  fi
fi
need_rust rust-web-clippy rustfmt-web
R_HOME=$(R RHOME)
R_INCLUDE_DIR=$(R --no-echo --no-restore -e "cat(R.home('include'))")
export R_HOME R_INCLUDE_DIR NOT_CRAN=true
# Where no time zone is set, R asks systemd for it, which answers on stderr where it does not run.
export TZ="${TZ:-UTC}"
if ! cargo nextest --version >/dev/null 2>&1; then
  cargo install --locked cargo-nextest ||
    echo "cargo-nextest could not be installed: cargo test takes its place"
fi

step "cargo fmt"
(cd src/rust && cargo fmt --all --check)
(cd src/rust/core/fuzz && cargo fmt --check)
step "cargo clippy"
(cd src/rust && cargo clippy --quiet --locked --workspace --all-targets -- -D warnings)
step "tests of the core"
if cargo nextest --version >/dev/null 2>&1; then
  (cd src/rust && cargo nextest run --locked -p rustcluster-core --status-level fail)
else
  (cd src/rust && cargo test --locked -p rustcluster-core)
fi

step "generated files"
tools/document.sh
if ! git diff --exit-code -- NAMESPACE man R/extendr-wrappers.R; then
  echo "generated files are out of date: run tools/document.sh and commit what it changes" >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
step "R CMD INSTALL"
mkdir "$work/library"
R CMD INSTALL --library="$work/library" . >"$work/install.log" 2>&1 ||
  { cat "$work/install.log"; exit 1; }

step "R CMD build and check"
(cd "$work" && R CMD build "$OLDPWD" >build.log 2>&1) || { cat "$work/build.log"; exit 1; }
# The tests follow, with their own report. How long an example takes depends on what else the
# machine does: only one that is far too slow is worth a note. The check asks CRAN whether suggested packages that
# are missing here are orphaned, and ends in the middle if it cannot: it gets an empty list instead.
Rscript --vanilla -e "dir.create('$work/cran/web/packages', recursive = TRUE)" \
  -e "saveRDS(data.frame(Package = '', Maintainer = '')[0, ], '$work/cran/web/packages/packages.rds')"
(cd "$work" && _R_CHECK_FORCE_SUGGESTS_=false _R_CHECK_EXAMPLE_TIMING_THRESHOLD_=60 R_CRAN_WEB="file://$work/cran" \
  R CMD check --as-cran --no-manual --no-tests rustcluster_*.tar.gz) || true
Rscript --vanilla tools/check-notes.R "$work/rustcluster.Rcheck/00check.log"

step "testthat"
status=0
R_LIBS="$work/library" Rscript tools/run-tests.R "$work/summary" || status=$?
step "done"
cat "$work/summary"
exit $status
