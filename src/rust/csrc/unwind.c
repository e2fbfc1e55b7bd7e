/* The one place where R may jump: everything that R calls from here returns to Rust, which then
 * cleans up and hands the jump back to R as a token (see src/unwind.rs). */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <setjmp.h>

static void back(void *buf, Rboolean jump)
{
    if (jump)
        longjmp(*(jmp_buf *) buf, 1);
}

/* Calls fn(data) with its value in *out and returns 0; returns 1 if R jumped out of it, and then
 * `token` holds where to. Only C frames, and Rust frames without anything to drop, lie between. */
int rustcluster_unwind_protect(SEXP (*fn)(void *), void *data, SEXP *out, SEXP token)
{
    jmp_buf buf;
    if (setjmp(buf))
        return 1;
    *out = R_UnwindProtect(fn, data, back, &buf, token);
    /* R keeps the value there, and so all of its memory until the next call. */
    SETCAR(token, R_NilValue);
    return 0;
}
