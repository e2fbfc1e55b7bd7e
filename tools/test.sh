#!/bin/bash
# Installs the packages that the tests need, and runs `tools/check full`. The last line is that of the R tests:
# "N passed, N failed, N skipped". RUSTCLUSTER_LONG_TESTS=1 runs the long tests, too.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/install.sh

need_packages r-base-core r-base-dev r-cran-testthat r-cran-roxygen2 r-cran-knitr \
  r-cran-rmarkdown r-cran-parallelly r-cran-cli openssh-server pandoc procps xz-utils devscripts qpdf \
  r-cran-foreach r-cran-iterators r-cran-doparallel r-cran-dorng r-cran-snow r-cran-dosnow r-cran-pbapply r-cran-future \
  r-cran-future.apply r-cran-furrr r-cran-progressr r-cran-later r-cran-promises \
  r-cran-data.table r-cran-dqrng r-cran-ff codespell r-cran-lintr r-cran-spelling
# Packages that accept a cluster, programs that embed R, and a browser.
if [ -n "${RUSTCLUSTER_LONG_TESTS:-}" ]; then
  need_packages r-cran-boot r-cran-caret r-cran-deoptim r-cran-lme4 r-cran-metafor r-cran-mgcv \
    r-bioc-biocparallel r-cran-pbkrtest r-cran-plumber r-cran-shiny r-cran-vegan \
    python3-rpy2 python3-jupyter-client r-cran-irkernel
  # Ubuntu has only a snap: the test is skipped there.
  if apt-cache show chromium-driver >/dev/null 2>&1; then
    need_packages chromium chromium-driver python3-selenium
  fi
fi
need_rust lints
if ! cargo nextest --version >/dev/null 2>&1; then
  cargo install --locked cargo-nextest ||
    echo "cargo-nextest could not be installed: cargo test takes its place"
fi
exec tools/check full
