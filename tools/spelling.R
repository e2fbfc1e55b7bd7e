# Checks the spelling of all prose by inst/WORDLIST, which has the words that no dictionary knows. `Rscript
# tools/spelling.R update` replaces it by all words that are unknown now: check them first.
update <- identical(commandArgs(trailingOnly = TRUE), "update")
wordlist <- "inst/WORDLIST"
known <- if (!update) readLines(wordlist, encoding = "UTF-8") else character()
package <- spelling::spell_check_package(".", use_wordlist = FALSE)
files <- spelling::spell_check_files("CONTRIBUTING.md", lang = "en-GB")
found <- rbind(as.data.frame(package), as.data.frame(files))
if (update) {
  words <- unique(found$word)
  writeLines(enc2utf8(words[order(tolower(words), words, method = "radix")]), wordlist, useBytes = TRUE)
  quit()
}
found <- found[!found$word %in% known, ]
for (i in seq_len(nrow(found))) cat(sprintf("%s: %s\n", paste(found$found[[i]], collapse = ", "), found$word[[i]]))
quit(status = as.integer(nrow(found) > 0L))
