# Makes src/Makevars from src/Makevars.in.
source("tools/rust.R")
rust <- find_rust()
# A release tarball contains the sources of all crates and is built without a network. Other sources get the
# crates from the registry. A checkout keeps its compiled files.
vendored <- file.exists("src/rust/vendor.tar.xz")
# No tarball contains this file.
checkout <- file.exists("tools/document.sh")
flags <- c(
  "--locked",
  if (vendored) "--offline",
  # CRAN's policy requires this limit.
  if (vendored) "-j 2"
)
values <- c(
  CARGO = rust$cargo,
  # cargo finds rustc on the PATH.
  CARGO_PATH = if (nzchar(rust$dir)) paste0('PATH="', rust$dir, ':$$PATH"') else "",
  CARGO_FLAGS = paste(flags, collapse = " "),
  CLEAN = if (!checkout) "rust_clean" else "",
  UNPACK = if (vendored) {
    paste("cd rust && rm -rf vendor && tar xJf vendor.tar.xz && mkdir -p .cargo &&",
          "cp vendor-config.toml .cargo/config.toml")
  } else "@true"
)
lines <- readLines("src/Makevars.in")
for (name in names(values)) {
  lines <- gsub(paste0("@", name, "@"), values[[name]], lines, fixed = TRUE)
}
writeLines(lines, "src/Makevars")
