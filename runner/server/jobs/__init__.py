"""Jobs: files of requests, done while nobody else needs the passes, that survive whatever ends the server.

    upload ──> file ──> batch: validating ──> in_progress ──> finalizing ──> completed
                                 └──> failed     └──> cancelling ──> cancelled

Words. *batch*: what OpenAI calls a job, a file of lines. *line*: a request of a batch, known by its number in the
file. *journal*: the tokens of a batch's lines so far, and its results. *worker*: the thread that runs batches.
"""
