"""HTTP: OpenAI's protocol for one model, whose passes may take minutes.

    client ──> schema ──> order ──> answer, shared by identical requests ──> stream or document ──> client
                                      ^ growths
    engine: the one thread that owns the model; requests join the next pass

Words. *work*: what the engine is asked for, a request for each choice. *growth*: what a pass gave one of them.
*answer*: all growths of a work so far, which any number of clients read, each at its own pace. *order*: what a client
asked for, checked, with its work. *progress*: where the pass is.

May import `generation` and what it may import. Needs the extra `serve`.
"""
