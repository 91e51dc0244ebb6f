"""One file a contender: Contender(job, variant, init), see `worker`.

step(x_ND) takes an optimiser step, wait() lets what it began end, params() is
{w_enc [M, D], b_enc [M], w_dec [M, D], b_dec [D]} in numpy. `init` is the same
dict of first parameters, which are copied: its arrays are let go.
"""
