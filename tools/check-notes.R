# Reads the log of R CMD check. Fails on an incomplete check, an error, a warning, or a note, unless the reason
# of the note is the lack of a network, the size of the library, or that the package is new.
log <- readLines(commandArgs(TRUE))
if (!any(startsWith(log, "Status: "))) stop("R CMD check has not come to its end: ", log[length(log)])
starts <- grep("^\\* checking", log)
ends <- c(starts[-1L] - 1L, length(log))
bad <- character()
# The notes of a machine without a network. Since R 4.6, they name packages that tests make and call: without the list
# of CRAN, R does not know that these cannot be declared.
made <- "((changing|pkfile|pkopen|pktemp)[^a-z]*)"
offline <- paste0(
  "unable to access index for repository|cannot open URL|^Status|^See|^ *.*00check.log|^for details|",
  "(imports?|calls?) not declared from:[^a-z]*", made, "*$|^[^a-z]*", made, "+$"
)
for (i in seq_along(starts)) {
  lines <- log[starts[i]:ends[i]]
  body <- lines[-1L][nzchar(trimws(lines[-1L]))]
  if (length(body) && all(grepl(offline, body))) next
  result <- regmatches(lines[1L], regexpr("(ERROR|WARNING|NOTE)$", lines[1L]))
  if (!length(result)) {
    later <- grep("^ *(ERROR|WARNING|NOTE)$", lines, value = TRUE)
    if (!length(later)) next
    result <- trimws(later[1L])
  }
  allowed <- result == "NOTE" && grepl(
    "CRAN incoming feasibility|future file timestamps|installed package size|package dependencies",
    lines[1L]
  )
  if (!allowed) bad <- c(bad, lines)
}
if (length(bad)) {
  writeLines(bad)
  quit(status = 1L)
}
