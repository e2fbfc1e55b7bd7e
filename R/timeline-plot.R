# plot() for timelines.

#' @export
plot.RustCluster <- function(x, ...) {
  badArgument(
    "x", "is a cluster, which cannot be plotted; use plot(clusterTimeline(x)) to see when its workers were busy"
  )
}

#' @rdname clusterTimeline
#' @order 2
#' @param x A data frame that `clusterTimeline()` has returned, or some of its rows.
#' @param xlim (numeric) The first and the last time to plot, in seconds; default: all intervals.
#' @param main (character) The title; default: the number of workers and the fraction of time they were busy.
#' @param xlab (character) The label of the time axis; default: its unit.
#' @param col (character) Four colours, named `busy`, `idle`, `transfer` and `lost`.
#' @param legend (logical) Whether to draw a legend.
#' @param ... For `plot()`: further arguments of [graphics::title()], such as `sub`. For `print()`: not used.
#' @details `plot()` draws a line for each worker. The lines of a host are together, with its name at the side. Merged
#'   intervals are paler the less of them was busy. A cross marks each worker failure, because most of them are too
#'   short to be visible. `plot()` returns `x`, invisibly.
#' @export
plot.rustcluster_timeline <- function(x, xlim = NULL, main = NULL, xlab = NULL,
                                      col = c(busy = "#2F6DB5", idle = "#E9EBEE", transfer = "#F0A30A",
                                              lost = "#C81D25"),
                                      legend = TRUE, ...) {
  checkTimeline(x)
  if (!isTRUE(legend) && !isFALSE(legend)) badArgument("legend", "must be TRUE or FALSE")
  if (!is.character(col) || !all(c("busy", "idle", "transfer", "lost") %in% names(col))) {
    badArgument("col", "must be colours named busy, idle, transfer and lost")
  }
  workers <- attr(x, "workers")
  if (is.null(workers)) workers <- unique(as.data.frame(x)[c("host", "rank")])
  xlim <- plain(xlim)
  for (name in c("main", "xlab")) {
    label <- get(name)
    if (!is.null(label) && !is.vector(label) && !is.language(label)) {
      badArgument(name, "must be a string or an expression")
    }
  }
  if (is.null(xlim)) xlim <- timelineSpan(x)
  if (!is.numeric(xlim) || length(xlim) != 2L || anyNA(xlim) || xlim[[1L]] >= xlim[[2L]]) {
    badArgument("xlim", "must be two numbers of seconds in increasing order")
  }
  rows <- timelineRows(workers)
  unit <- timeUnit(diff(xlim))

  old <- graphics::par(mar = c(3.6, 1, 3.4, 1), mgp = c(2.2, 0.6, 0))
  on.exit(graphics::par(old))
  graphics::plot.new()
  sides <- hostLabels(rows)
  room <- max(graphics::strwidth(sides$label, "inches", cex = sides$cex), 0) +
    if (sides$ranks) 0.45 else 0.2
  edges <- graphics::par("mai")
  # Leave room for the plot beside a long name.
  edges[[2L]] <- min(room, graphics::par("din")[[1L]] / 3)
  graphics::par(mai = edges)
  graphics::par(new = TRUE)
  graphics::plot.new()
  graphics::plot.window(xlim, c(max(rows$y, 0) + 0.5, 0), xaxs = "i", yaxs = "i")

  drawRows(x, rows, xlim, col)
  graphics::axis(1L, at = pretty(xlim / unit$seconds) * unit$seconds, labels = pretty(xlim / unit$seconds),
                 tcl = -0.3, lwd = 0, lwd.ticks = 1)
  drawLabels(rows, sides, xlim)
  if (is.null(main)) main <- timelineTitle(x, rows, xlim)
  if (is.null(xlab)) xlab <- paste(unit$name, "since", c(attr(x, "since"), "the cluster was made")[[1L]])
  graphics::title(main = main, xlab = xlab, adj = 0, ...)
  if (legend) {
    graphics::legend(
      graphics::grconvertX(1, "npc"), graphics::grconvertY(1, "npc"), xjust = 1, yjust = 0, horiz = TRUE,
      legend = c("busy", "idle", "transfer", "lost"), xpd = NA, bty = "n", cex = 0.85, x.intersp = 0.5,
      fill = c(col[c("busy", "idle", "transfer")], NA), border = c(NA, "grey75", NA, NA),
      pch = c(NA, NA, NA, 4), col = col[["lost"]]
    )
  }
  invisible(x)
}

checkTimeline <- function(x) {
  numbers <- c("rank", "start", "end", "busy")
  for (name in c("host", "kind", numbers)) {
    if (is.null(x[[name]])) badArgument("x", "has no column `", name, "`; plot the result of clusterTimeline()")
  }
  for (name in numbers) {
    if (!is.numeric(x[[name]])) badArgument("x", "must have numbers in column `", name, "`")
  }
}

# Returns the first and the last time of a timeline.
timelineSpan <- function(x) {
  now <- attr(x, "now")
  if (!nrow(x)) return(c(0, max(now, 1e-3)))
  span <- range(x$start, x$end)
  if (diff(span) <= 0) span + c(0, 1e-3) else span
}

# Returns the workers with the position `y` of their lines, from the top. The lines of a host are together, with a gap
# between hosts.
timelineRows <- function(workers) {
  hosts <- unique(workers$host)
  rows <- workers[order(match(workers$host, hosts)), ]
  gap <- max(0.6, nrow(rows) / 60)
  rows$y <- seq_len(nrow(rows)) - 0.5 + gap * (match(rows$host, hosts) - 1L)
  rows
}

timeUnit <- function(seconds) {
  if (seconds < 600) return(list(seconds = 1, name = "seconds"))
  if (seconds < 6 * 3600) list(seconds = 60, name = "minutes") else list(seconds = 3600, name = "hours")
}

# Returns the labels of the hosts, with their positions and their size.
hostLabels <- function(rows) {
  hosts <- unique(rows$host)
  ranks <- nrow(rows) > 0L && nrow(rows) <= 40L
  middle <- vapply(hosts, function(host) mean(range(rows$y[rows$host == host])), 0)
  list(
    hosts = hosts, label = hosts, middle = middle, ranks = ranks,
    cex = if (length(hosts) <= 12L) 0.9 else 0.65
  )
}

drawLabels <- function(rows, sides, xlim) {
  if (sides$ranks) {
    cex <- min(0.75, 16 / nrow(rows))
    graphics::mtext(rows$rank, side = 2L, at = rows$y, line = 0.3, las = 1L, cex = cex, col = "grey30")
  }
  # Skip labels that would overlap the previous one.
  height <- abs(graphics::strheight("M", cex = sides$cex)) * 1.3
  last <- -Inf
  for (i in seq_along(sides$hosts)) {
    if (sides$middle[[i]] - last < height) next
    last <- sides$middle[[i]]
    graphics::mtext(
      sides$label[[i]], side = 2L, at = last, line = if (sides$ranks) 1.8 else 0.4, las = 1L, cex = sides$cex
    )
  }
}

drawRows <- function(x, rows, xlim, col) {
  # Draw no gaps between many lines.
  half <- if (nrow(rows) <= 60L) 0.42 else 0.5
  if (nrow(rows)) {
    graphics::rect(xlim[[1L]], rows$y - half, xlim[[2L]], rows$y + half, col = col[["idle"]], border = NA)
  }
  of <- match(paste(x$host, x$rank), paste(rows$host, rows$rank))
  inside <- !is.na(of) & x$end >= xlim[[1L]] & x$start <= xlim[[2L]]
  start <- pmax(x$start, xlim[[1L]])
  end <- pmin(x$end, xlim[[2L]])
  bar <- function(which, fill) {
    graphics::rect(start[which], rows$y[of[which]] - half, end[which], rows$y[of[which]] + half, col = fill,
                   border = NA)
  }
  shades <- grDevices::colorRampPalette(c(col[["idle"]], col[["busy"]]))(9L)[-1L]
  busy <- which(inside & x$kind == "busy")
  if (length(busy)) {
    part <- x$busy[busy] / pmax(x$end[busy] - x$start[busy], 1e-9)
    bar(busy, shades[pmin(pmax(ceiling(part * 8), 1L), 8L)])
    # Separate consecutive tasks where they are wide enough.
    wide <- busy[end[busy] - start[busy] > diff(xlim) / 200 & nrow(rows) <= 60L]
    y <- rows$y[of[wide]]
    graphics::segments(start[wide], y - half, y1 = y + half, col = "white", lwd = 0.7)
  }
  for (kind in c("transfer", "lost")) {
    which <- which(inside & x$kind == kind)
    if (length(which)) bar(which, col[[kind]])
  }
  lost <- which(inside & x$kind == "lost")
  if (length(lost)) {
    graphics::points(start[lost], rows$y[of[lost]], pch = 4L, col = col[["lost"]], lwd = 2, xpd = NA)
  }
}

# Returns the title: the number of workers, and the fraction of the plotted time that they were busy.
timelineTitle <- function(x, rows, xlim) {
  shown <- pmax(pmin(x$end, xlim[[2L]]) - pmax(x$start, xlim[[1L]]), 0)
  part <- ifelse(x$end > x$start, shown / (x$end - x$start), 0)
  busy <- sum(x$busy * part) / (diff(xlim) * max(nrow(rows), 1L))
  sprintf("%s, %.0f %% busy", counted(nrow(rows), "worker"), 100 * busy)
}
