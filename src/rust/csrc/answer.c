/* An answer to a task as parallel's recvData() gives it. */
#define R_NO_REMAP
#include <R.h>
#include <Rinternals.h>

SEXP rustcluster_arguments(void *common, void *element, int spread);

enum { TYPE, NAMES, TIME_NAMES, TIME_CLASS, PLACED_NAMES, KEPT };
static SEXP kept = NULL;

static SEXP strings(int n, const char *const *values)
{
    SEXP all = PROTECT(Rf_allocVector(STRSXP, n));

    for (int i = 0; i < n; i++)
        SET_STRING_ELT(all, i, Rf_mkChar(values[i]));
    MARK_NOT_MUTABLE(all);
    UNPROTECT(1);
    return all;
}

static void prepare(void)
{
    static const char *const type[] = {"VALUE"};
    static const char *const names[] = {"type", "value", "success", "time", "tag"};
    static const char *const times[] = {
        "user.self", "sys.self", "elapsed", "user.child", "sys.child",
    };
    static const char *const time_class[] = {"proc_time"};
    static const char *const placed[] = {"node", "value"};

    if (kept)
        return;
    SEXP list = PROTECT(Rf_allocVector(VECSXP, KEPT));
    SET_VECTOR_ELT(list, TYPE, strings(1, type));
    SET_VECTOR_ELT(list, NAMES, strings(5, names));
    SET_VECTOR_ELT(list, TIME_NAMES, strings(5, times));
    SET_VECTOR_ELT(list, TIME_CLASS, strings(1, time_class));
    SET_VECTOR_ELT(list, PLACED_NAMES, strings(2, placed));
    R_PreserveObject(list);
    kept = list;
    UNPROTECT(1);
}

/* `value` and `tag` must be protected; the answer is not. */
SEXP rustcluster_answer(void *value, int success, const double time[5], void *tag)
{
    prepare();
    SEXP answer = PROTECT(Rf_allocVector(VECSXP, 5));
    SEXP times = Rf_allocVector(REALSXP, 5);

    SET_VECTOR_ELT(answer, 3, times);
    for (int i = 0; i < 5; i++)
        REAL(times)[i] = time[i];
    Rf_setAttrib(times, R_NamesSymbol, VECTOR_ELT(kept, TIME_NAMES));
    Rf_setAttrib(times, R_ClassSymbol, VECTOR_ELT(kept, TIME_CLASS));
    SET_VECTOR_ELT(answer, 0, VECTOR_ELT(kept, TYPE));
    SET_VECTOR_ELT(answer, 1, (SEXP) value);
    SET_VECTOR_ELT(answer, 2, Rf_ScalarLogical(success));
    SET_VECTOR_ELT(answer, 4, (SEXP) tag);
    Rf_setAttrib(answer, R_NamesSymbol, VECTOR_ELT(kept, NAMES));
    UNPROTECT(1);
    return answer;
}

/* An answer with its node's place, as parallel's recvOneData() gives it. `answer` must be
 * protected; the result is not. */
SEXP rustcluster_placed(int node, void *answer)
{
    prepare();
    SEXP placed = PROTECT(Rf_allocVector(VECSXP, 2));

    SET_VECTOR_ELT(placed, 0, Rf_ScalarInteger(node));
    SET_VECTOR_ELT(placed, 1, (SEXP) answer);
    Rf_setAttrib(placed, R_NamesSymbol, VECTOR_ELT(kept, PLACED_NAMES));
    UNPROTECT(1);
    return placed;
}

/* The value of such an answer. */
SEXP rustcluster_answer_value(void *answer)
{
    SEXP all = (SEXP) answer;

    return TYPEOF(all) == VECSXP && Rf_xlength(all) == 5 ? VECTOR_ELT(all, 1) : R_NilValue;
}

/* Whether such an answer says that its task failed. */
int rustcluster_answer_failed(void *answer)
{
    SEXP all = (SEXP) answer;

    return TYPEOF(all) == VECSXP && Rf_xlength(all) == 5 && Rf_asLogical(VECTOR_ELT(all, 2)) == 0;
}

static SEXP named(int n, const char *const *names)
{
    SEXP list = PROTECT(Rf_allocVector(VECSXP, n));

    Rf_setAttrib(list, R_NamesSymbol, strings(n, names));
    UNPROTECT(1);
    return list;
}

/* parallel's message for one of the tasks that have `common`, a list of a function and of arguments;
 * `element`: its first argument, or, to be `spread`, a list of arguments. The result is not
 * protected. */
SEXP rustcluster_message(void *common, void *element, int spread)
{
    static const char *const of_message[] = {"type", "data", "tag"};
    static const char *const of_data[] = {"fun", "args", "return", "tag"};
    SEXP args = PROTECT(rustcluster_arguments(common, element, spread));
    SEXP message = PROTECT(named(3, of_message)), data = named(4, of_data);

    SET_VECTOR_ELT(message, 1, data);
    SET_VECTOR_ELT(message, 0, Rf_mkString("EXEC"));
    SET_VECTOR_ELT(data, 0, VECTOR_ELT((SEXP) common, 0));
    SET_VECTOR_ELT(data, 1, args);
    SET_VECTOR_ELT(data, 2, Rf_ScalarLogical(TRUE));
    UNPROTECT(2);
    return message;
}
