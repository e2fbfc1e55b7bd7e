/* A worker's task, from its message to its answer: what parallel's workCommand() does between
 * recvData() and sendData(). In C, because R may jump out of all of it. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <string.h>

/* What is made once or must live as long as a task does: the elements of one preserved list. */
enum { MESSAGE, BEGAN, CLOCK, QUOTE, CALLER, TYPE, NAMES, KEPT };
static SEXP kept = NULL;

static void keep(int what, SEXP value)
{
    SET_VECTOR_ELT(kept, what, value);
}

static void prepare(void)
{
    static const char *names[] = {"type", "value", "success", "time", "tag"};

    if (kept)
        return;
    SEXP list = PROTECT(Rf_allocVector(VECSXP, KEPT));
    SET_VECTOR_ELT(list, CLOCK, Rf_lang1(Rf_findFun(Rf_install("proc.time"), R_BaseEnv)));
    /* quote or base::quote, as this R's do.call() has it. */
    SEXP enquote = PROTECT(Rf_lang2(Rf_install("enquote"), R_NilValue));
    SET_VECTOR_ELT(list, QUOTE, CAR(Rf_eval(enquote, R_BaseEnv)));
    SET_VECTOR_ELT(list, TYPE, Rf_mkString("VALUE"));
    SEXP name = PROTECT(Rf_mkString("parallel"));
    SET_VECTOR_ELT(list, CALLER, R_FindNamespace(name));
    SEXP of_answer = Rf_allocVector(STRSXP, 5);
    SET_VECTOR_ELT(list, NAMES, of_answer);
    for (int i = 0; i < 5; i++)
        SET_STRING_ELT(of_answer, i, Rf_mkChar(names[i]));
    MARK_NOT_MUTABLE(VECTOR_ELT(list, TYPE));
    MARK_NOT_MUTABLE(of_answer);
    R_PreserveObject(list);
    kept = list;
    UNPROTECT(3);
}

/* An element of a list by its name, or NULL. */
static SEXP field(SEXP list, const char *name)
{
    SEXP names = TYPEOF(list) == VECSXP ? Rf_getAttrib(list, R_NamesSymbol) : R_NilValue;

    if (TYPEOF(names) == STRSXP)
        for (R_xlen_t i = 0; i < Rf_xlength(list); i++)
            if (!strcmp(CHAR(STRING_ELT(names, i)), name))
                return VECTOR_ELT(list, i);
    return R_NilValue;
}

static SEXP quoted(SEXP value)
{
    return Rf_lang2(VECTOR_ELT(kept, QUOTE), value);
}

/* The call that do.call(fun, args, quote = TRUE) makes; that of do.call itself where there is more
 * to it than that. */
static SEXP call_of(SEXP fun, SEXP args)
{
    if (!Rf_isFunction(fun) || TYPEOF(args) != VECSXP) {
        SEXP rest = PROTECT(Rf_list3(R_NilValue, R_NilValue, R_NilValue));
        SETCAR(rest, quoted(fun));
        SETCADR(rest, quoted(args));
        SETCADDR(rest, Rf_ScalarLogical(TRUE));
        SET_TAG(CDDR(rest), R_QuoteSymbol);
        SEXP call = Rf_lcons(Rf_install("do.call"), rest);
        UNPROTECT(1);
        return call;
    }
    R_xlen_t n = Rf_xlength(args);
    SEXP names = Rf_getAttrib(args, R_NamesSymbol);
    SEXP rest = PROTECT(Rf_allocList((int) n)), at = rest;
    for (R_xlen_t i = 0; i < n; i++, at = CDR(at)) {
        SETCAR(at, quoted(VECTOR_ELT(args, i)));
        if (TYPEOF(names) == STRSXP && LENGTH(STRING_ELT(names, i)))
            SET_TAG(at, Rf_installTrChar(STRING_ELT(names, i)));
    }
    SEXP call = Rf_lcons(fun, rest);
    UNPROTECT(1);
    return call;
}

static SEXP now(void)
{
    return Rf_eval(VECTOR_ELT(kept, CLOCK), R_BaseEnv);
}

/* The time since the task began, as the difference of two proc.time()s. */
static SEXP elapsed(void)
{
    SEXP time = now(), began = VECTOR_ELT(kept, BEGAN);

    for (R_xlen_t i = 0; i < Rf_xlength(time); i++)
        REAL(time)[i] -= TYPEOF(began) == REALSXP ? REAL(began)[i] : REAL(time)[i];
    return time;
}

static SEXP answer_of(SEXP value, int success)
{
    SEXP answer = PROTECT(Rf_allocVector(VECSXP, 5));

    SET_VECTOR_ELT(answer, 1, value);
    SET_VECTOR_ELT(answer, 3, elapsed());
    SET_VECTOR_ELT(answer, 0, VECTOR_ELT(kept, TYPE));
    SET_VECTOR_ELT(answer, 2, Rf_ScalarLogical(success));
    SET_VECTOR_ELT(answer, 4, field(field(VECTOR_ELT(kept, MESSAGE), "data"), "tag"));
    Rf_setAttrib(answer, R_NamesSymbol, VECTOR_ELT(kept, NAMES));
    keep(MESSAGE, R_NilValue);
    keep(BEGAN, R_NilValue);
    UNPROTECT(1);
    return answer;
}

/* The answer to a message; NULL to the one that says that there will be no more. */
SEXP rustcluster_run_task(void *message)
{
    prepare();
    keep(MESSAGE, (SEXP) message);
    keep(BEGAN, R_NilValue);
    SEXP type = field((SEXP) message, "type"), data = field((SEXP) message, "data");
    if (TYPEOF(type) != STRSXP || LENGTH(type) != 1)
        Rf_error("a message without a type");
    if (!strcmp(CHAR(STRING_ELT(type, 0)), "DONE"))
        return R_NilValue;
    SEXP call = PROTECT(call_of(field(data, "fun"), field(data, "args")));
    /* A frame of its own for each task, where workCommand() has its own: what a task assigns in
     * its caller's frame is gone after it. */
    SEXP caller = PROTECT(R_NewEnv(VECTOR_ELT(kept, CALLER), FALSE, 0));
    keep(BEGAN, now());
    SEXP value = PROTECT(Rf_eval(call, caller));
    SEXP answer = answer_of(value, TRUE);
    UNPROTECT(3);
    return answer;
}

/* The answer to a message that came to nothing. */
SEXP rustcluster_fail_task(void *value)
{
    prepare();
    return answer_of((SEXP) value, FALSE);
}
