/* A worker's task, from its message to its answer: what parallel's workCommand() does between
 * recvData() and sendData(). In C, because R may jump out of all of it. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>
#include <math.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* What is made once or must live as long as a task does: the elements of one preserved list. */
enum { THE_FUN, THE_ARGS, THE_TAG, QUOTE, CALLER, KEPT };
static SEXP kept = NULL;

static void keep(int what, SEXP value)
{
    SET_VECTOR_ELT(kept, what, value);
}

static void prepare(void)
{
    if (kept)
        return;
    SEXP list = PROTECT(Rf_allocVector(VECSXP, KEPT));
    /* quote or base::quote, as this R's do.call() has it. */
    SEXP enquote = PROTECT(Rf_lang2(Rf_install("enquote"), R_NilValue));
    SET_VECTOR_ELT(list, QUOTE, CAR(Rf_eval(enquote, R_BaseEnv)));
    SEXP name = PROTECT(Rf_mkString("parallel"));
    SET_VECTOR_ELT(list, CALLER, R_FindNamespace(name));
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

/* As proc.time() has it: user, system, elapsed, and the first two of children, in seconds, cut or
 * rounded to milliseconds. */
static void now(double time[5])
{
    static time_t start = 0;
    struct rusage self, children;
    struct timespec clock;

    clock_gettime(CLOCK_MONOTONIC, &clock);
    getrusage(RUSAGE_SELF, &self);
    getrusage(RUSAGE_CHILDREN, &children);
    if (!start)
        start = clock.tv_sec;
    time[0] = self.ru_utime.tv_sec + 1e-3 * (self.ru_utime.tv_usec / 1000);
    time[1] = self.ru_stime.tv_sec + 1e-3 * (self.ru_stime.tv_usec / 1000);
    time[2] = (clock.tv_sec - start) + 1e-3 * rint(1e-6 * clock.tv_nsec);
    time[3] = children.ru_utime.tv_sec + 1e-3 * (children.ru_utime.tv_usec / 1000);
    time[4] = children.ru_stime.tv_sec + 1e-3 * (children.ru_stime.tv_usec / 1000);
}

static double began[5];
static int timed = 0;

/* What a message holds; 0 if that is that there will be no more. */
int rustcluster_take_message(void *message)
{
    SEXP type = field((SEXP) message, "type"), data = field((SEXP) message, "data");

    prepare();
    timed = 0;
    if (TYPEOF(type) != STRSXP || LENGTH(type) != 1)
        Rf_error("a message without a type");
    if (!strcmp(CHAR(STRING_ELT(type, 0)), "DONE"))
        return 0;
    keep(THE_FUN, field(data, "fun"));
    keep(THE_ARGS, field(data, "args"));
    keep(THE_TAG, field(data, "tag"));
    return 1;
}

/* The same of one that came in parts. */
void rustcluster_take_call(void *fun, void *args, void *tag)
{
    prepare();
    timed = 0;
    keep(THE_FUN, (SEXP) fun);
    keep(THE_ARGS, (SEXP) args);
    keep(THE_TAG, (SEXP) tag);
}

/* The names of a list, or NULL. */
static SEXP names_of(SEXP list)
{
    SEXP names = Rf_getAttrib(list, R_NamesSymbol);

    return TYPEOF(names) == STRSXP ? names : NULL;
}

/* The arguments of one of many tasks that have `common`, a list of a function and of arguments.
 * `element`: its first argument, or, to be `spread`, a list of arguments. The result is not
 * protected. */
SEXP rustcluster_arguments(void *common, void *element, int spread)
{
    SEXP rest = VECTOR_ELT((SEXP) common, 1);
    R_xlen_t first = spread ? Rf_xlength((SEXP) element) : 1, more = Rf_xlength(rest);
    SEXP args = PROTECT(Rf_allocVector(VECSXP, first + more));
    SEXP of_first = spread ? names_of((SEXP) element) : NULL, of_more = names_of(rest);

    for (R_xlen_t i = 0; i < first; i++)
        SET_VECTOR_ELT(args, i, spread ? VECTOR_ELT((SEXP) element, i) : (SEXP) element);
    for (R_xlen_t i = 0; i < more; i++)
        SET_VECTOR_ELT(args, first + i, VECTOR_ELT(rest, i));
    if (of_first || of_more) {
        SEXP names = PROTECT(Rf_allocVector(STRSXP, first + more));
        for (R_xlen_t i = 0; of_first && i < first; i++)
            SET_STRING_ELT(names, i, STRING_ELT(of_first, i));
        for (R_xlen_t i = 0; of_more && i < more; i++)
            SET_STRING_ELT(names, first + i, STRING_ELT(of_more, i));
        Rf_setAttrib(args, R_NamesSymbol, names);
        UNPROTECT(1);
    }
    UNPROTECT(1);
    return args;
}

/* Takes one of many tasks. */
void rustcluster_take_element(void *common, void *element, int spread)
{
    prepare();
    timed = 0;
    SEXP args = rustcluster_arguments(common, element, spread);
    keep(THE_ARGS, args);
    keep(THE_FUN, VECTOR_ELT((SEXP) common, 0));
    keep(THE_TAG, R_NilValue);
}

/* The value of the task that was taken; `with_time`: for rustcluster_end_task(). */
SEXP rustcluster_run_task(int with_time)
{
    SEXP call = PROTECT(call_of(VECTOR_ELT(kept, THE_FUN), VECTOR_ELT(kept, THE_ARGS)));
    /* A frame of its own for each task, where workCommand() has its own: what a task assigns in
     * its caller's frame is gone after it. */
    SEXP caller = PROTECT(R_NewEnv(VECTOR_ELT(kept, CALLER), FALSE, 0));

    if (with_time) {
        now(began);
        timed = 1;
    }
    SEXP value = Rf_eval(call, caller);
    UNPROTECT(2);
    return value;
}

/* Ends the task: its tag, and in `time` the difference of two proc.time()s. The tag is not
 * protected. */
SEXP rustcluster_end_task(double time[5])
{
    prepare();
    now(time);
    for (int i = 0; i < 5; i++)
        time[i] = timed ? time[i] - began[i] : 0;
    SEXP tag = VECTOR_ELT(kept, THE_TAG);
    timed = 0;
    keep(THE_FUN, R_NilValue);
    keep(THE_ARGS, R_NilValue);
    keep(THE_TAG, R_NilValue);
    return tag;
}
