"""The commands that run a model, or say what running it would take. Heavy imports wait inside them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from runner.cli import bench as bench_command
from runner.cli import plan as plan_command
from runner.cli.constraint import read_constraint
from runner.cli.generate import GenerateOptions
from runner.cli.generate import generate as run_generate
from runner.cli.score import DEFAULT_CONTEXT, DEFAULT_STRIDE, ScoreOptions
from runner.cli.score import score as run_score
from runner.cli.serve import ServeOptions
from runner.cli.serve import serve as run_serve
from runner.generation.options import GenerationOptions, Sampling, read_biases
from toolkit.cli.options import Also, Draft, Json, Prepared, PromptTokens, Ram, Speculate


def generate(
    directory: Prepared,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The text to continue is in there.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Prompts in place of PROMPT: .txt with one a line, or .jsonl."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Results of --prompts, one a line; run again, it resumes."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="The most new tokens of a prompt.")
    ] = GenerationOptions.max_new_tokens,
    ram: Ram = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Prompts that share a pass.", show_default="what the RAM suggests"),
    ] = None,
    speculate: Speculate = GenerationOptions.speculate,
    draft: Draft = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", help="Draw tokens; higher is more daring.", show_default="the likeliest token"
        ),
    ] = Sampling.temperature,
    top_k: Annotated[
        int, typer.Option(metavar="K", help="Draw among the K likeliest tokens.", show_default="all")
    ] = Sampling.top_k,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Draw among the likeliest tokens that have this probability together."
        ),
    ] = Sampling.top_p,
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P", help="Draw among tokens of this fraction of the likeliest one's probability."
        ),
    ] = Sampling.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1: less likely are tokens that prompt or text have.")
    ] = Sampling.repetition_penalty,
    presence_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from the logits of tokens that the text has.")
    ] = Sampling.presence_penalty,
    frequency_penalty: Annotated[
        float, typer.Option(metavar="X", help="Taken from them as often as the text has them.")
    ] = Sampling.frequency_penalty,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=X", help="Added to the logit of a token id. Repeatable.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Makes a drawn text repeatable.", show_default="drawn and reported"),
    ] = None,
    n: Annotated[int, typer.Option(metavar="N", help="Continuations of each prompt.")] = Sampling.n,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Ends the text, and is no part of it. Repeatable."),
    ] = None,
    min_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens before the text may end by itself.")
    ] = Sampling.min_new_tokens,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="The end-of-text token ends nothing.")
    ] = Sampling.ignore_eos,
    logprobs: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Report log-probabilities, also of the N likeliest tokens; with --json.",
        ),
    ] = None,
    json_schema: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output is JSON that fits this schema.")
    ] = None,
    regex: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The output matches this regular expression.")
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The output follows this Lark grammar.")
    ] = None,
    session: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Keep each pass there; running it again resumes, also with a longer PROMPT."
        ),
    ] = None,
    also: Also = None,
    as_json: Json = False,
) -> int:
    """Continue a prompt, printed as it grows, or a file of them. Each token is the likeliest one, or drawn."""
    generation = GenerationOptions(
        max_new_tokens=max_new_tokens, speculate=speculate, draft=draft, batch=batch
    )
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=read_biases(logit_bias or ()),
        seed=seed,
        n=n,
        stop=tuple(stop or ()),
        min_new_tokens=min_new_tokens,
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        **read_constraint(json_schema, regex, grammar),
    )
    return run_generate(
        GenerateOptions(
            directory,
            prompt=prompt,
            prompt_file=prompt_file,
            prompts=prompts,
            out=out,
            ram=ram,
            as_json=as_json,
            session=session,
            generation=generation,
            sampling=sampling,
            also=tuple(also or ()),
        )
    )


def score(
    directory: Prepared,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .txt, one long text, or a .jsonl of texts.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Scores, one a line; run again, it resumes.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of a window of a long text.", show_default=str(DEFAULT_CONTEXT)
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens from one window to the next.", show_default=str(DEFAULT_STRIDE)
        ),
    ] = None,
    ram: Ram = None,
    also: Also = None,
    as_json: Json = False,
) -> int:
    """Log-probabilities of given texts: the perplexity of a long one, or a score for each line."""
    return run_score(
        ScoreOptions(
            directory,
            file,
            out=out,
            ram=ram,
            as_json=as_json,
            context=context,
            stride=stride,
            also=tuple(also or ()),
        )
    )


def serve(
    directory: Prepared,
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen.")] = ServeOptions.host,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="Where to listen; 0 takes a free one.")
    ] = ServeOptions.port,
    ram: Ram = None,
    draft: Draft = None,
    speculate: Speculate = GenerationOptions.speculate,
    max_batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Texts that share a pass.", show_default="what the RAM suggests"
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Clients must have it. Repeatable.", show_default="BLOOMDESK_API_KEY"
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let others than this machine in without a key.")
    ] = False,
    model_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What clients call the model.", show_default="the directory's name"
        ),
    ] = None,
    chat_template: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Jinja template of chats.", show_default="the tokenizer's"),
    ] = None,
    max_waiting: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Texts that may wait for a pass; more get a 429.", show_default="4096"
        ),
    ] = None,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Each line of the log is a JSON object.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Prompts are in the log.")] = False,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep files, batches and the tokens of requests there; they resume when it starts again.",
        ),
    ] = None,
    max_file_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The largest file of a batch.", show_default="210MB"),
    ] = None,
    max_lines: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The most lines of a batch.", show_default="50000"),
    ] = None,
    also: Also = None,
) -> int:
    """Answer OpenAI's protocol over HTTP, for one model. Requests share passes, and join and leave between them."""
    generation = GenerationOptions(speculate=speculate, draft=draft, batch=max_batch)
    return run_serve(
        ServeOptions(
            directory,
            host=host,
            port=port,
            ram=ram,
            keys=tuple(api_key or ()),
            no_auth=no_auth,
            model_name=model_name,
            chat_template=chat_template,
            max_waiting=max_waiting,
            log_json=log_json,
            log_prompts=log_prompts,
            data=data,
            max_file_size=max_file_size,
            max_lines=max_lines,
            generation=generation,
            also=tuple(also or ()),
        )
    )


def bench(
    directory: Prepared,
    ram: Ram = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to time.")
    ] = bench_command.DEFAULT_TOKENS,
    prompt_tokens: PromptTokens = bench_command.DEFAULT_PROMPT_TOKENS,
    also: Also = None,
    as_json: Json = False,
) -> int:
    """Time a few tokens. They are compared with the least that this machine's disk and memory allow."""
    return bench_command.bench(
        directory, ram=ram, tokens=tokens, prompt_tokens=prompt_tokens, also=also or (), as_json=as_json
    )


def plan(
    directory: Annotated[
        Path, typer.Argument(metavar="DST", help="A prepared directory, or any on the disk in question.")
    ] = Path(),
    ram: Ram = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="One of the family, like bloom-7b1.",
            show_default="what DST holds, or bigscience/bloom",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to generate.")
    ] = GenerationOptions.max_new_tokens,
    prompt_tokens: PromptTokens = bench_command.DEFAULT_PROMPT_TOKENS,
    draft: Draft = None,
    also: Also = None,
    machines: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Forecast N machines like this one, too, each with a slice."),
    ] = 1,
    network: Annotated[
        float, typer.Option(metavar="G", min=0.001, help="Gbit/s between the machines.")
    ] = plan_command.DEFAULT_NETWORK,
    disk: Annotated[
        str | None,
        typer.Option(
            metavar="RATE,..",
            help="Forecast disks of these rates, too, like 0.4GB/s,0.2GB/s, with the rows spread over them.",
            show_default="none",
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Forecast disk, RAM and seconds a token. Nothing is downloaded; exit status 1 if the disk is too small."""
    from toolkit.commands.schedule import space_to_prepare

    return plan_command.plan(
        space_to_prepare,
        directory,
        ram=ram,
        model=model,
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        draft=draft,
        also=also or (),
        machines=machines,
        network=network,
        disks=disk,
        as_json=as_json,
    )
