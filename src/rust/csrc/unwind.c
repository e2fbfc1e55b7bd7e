/* Calls R functions from Rust such that R's long jumps stop here. Rust then drops its values and continues the jump
 * with a token (see src/r/unwind.rs). */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <setjmp.h>

/* R_UnwindProtect() calls this function at the end, and before a jump. */
static void leave(void *buf, Rboolean jump)
{
    if (jump)
        longjmp(*(jmp_buf *) buf, 1);
}

/* Calls fn(data), stores its value in *out and returns 0. Returns 1 if R jumped out of fn(); `token` then contains
 * the target of the jump. The jump may skip only C frames and Rust frames that have nothing to drop. */
int rustcluster_unwind_protect(SEXP (*fn)(void *), void *data, SEXP *out, SEXP token)
{
    jmp_buf buf;
    if (setjmp(buf))
        return 1;
    *out = R_UnwindProtect(fn, data, leave, &buf, token);
    /* R_UnwindProtect() stores the value there, which would keep it alive until the next call. */
    SETCAR(token, R_NilValue);
    return 0;
}
