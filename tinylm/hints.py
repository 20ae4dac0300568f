"""Hints for unknown keys, values, commands and options, based on the names that other programs use."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from tinylm.errors import InputError, did_you_mean

RECIPE_KEYS = {
    "training.global_batch_size": "batch_size batch bs train_batch_size batchsize total_batch_size",
    "training.micro_batch_size": "device_batch_size per_device_train_batch_size microbatch_size mini_batch_size",
    "training.optimizer": "optim",
    "training.optimizer.lr": "learning_rate max_lr peak_lr alpha_lr learningrate base_lr max_learning_rate",
    "training.optimizer.weight_decay": "wd decay_rate l2",
    "training.optimizer.betas": "beta1 beta2 beta adam_beta1 adam_beta2 adam_betas",
    "training.optimizer.eps": "epsilon adam_epsilon adam_eps",
    "training.schedule": "scheduler lr_scheduler lr_schedule lr_scheduler_type lr_decay learning_rate_schedule",
    "training.schedule.warmup": "warmup_steps warmup_iters warmup_ratio num_warmup_steps warm_up lr_warmup warmup_fraction",
    "training.schedule.floor": "min_lr min_learning_rate lr_min eta_min final_lr",
    "training.steps": "step max_steps max_iters num_steps n_steps iterations iters max_iterations total_steps train_steps "
    "num_iterations",
    "training.tokens": "num_tokens n_tokens total_tokens train_tokens token_budget",
    "training.epochs": "epoch num_epochs n_epochs num_train_epochs max_epochs",
    "training.minutes": "time max_time duration hours seconds minute max_minutes time_limit",
    "training.clip_grad_norm": "grad_clip gradient_clip gradient_clipping gradient_clip_val max_grad_norm clip clip_norm clip_grad",
    "training.precision": "dtype torch_dtype mixed_precision amp fp16 bf16 half autocast",
    "training.activation_checkpointing": "gradient_checkpointing grad_checkpointing checkpoint_activations use_checkpoint",
    "training.compile": "torch_compile compiled use_compile",
    "training.log_every": "logging_steps log_interval log_steps log_freq log_every_n_steps",
    "training.parallel": "ddp fsdp strategy distributed",
    "model.preset": "model_type model_name arch type variant size",
    "model.n_embd": "hidden_size d_model dim n_embed embed_dim embedding_dim embedding_size emb_dim hidden_dim model_dim width "
    "d_embed",
    "model.n_layer": "num_layers num_hidden_layers n_layers layers depth n_blocks num_blocks n_block num_layer",
    "model.n_head": "num_heads num_attention_heads n_heads heads nhead attention_heads num_head",
    "model.n_kv_head": "num_key_value_heads n_kv_heads num_kv_heads kv_heads",
    "model.context_length": "block_size max_position_embeddings seq_len sequence_length seq_length max_seq_len max_seq_length "
    "context ctx ctx_len n_ctx n_positions max_length context_size context_window context_len max_len window",
    "model.feed_forward_multiple": "mlp_ratio ffn_multiple ffn_mult mlp_multiple expansion expansion_factor",
    "model.n_inner": "intermediate_size d_ff ffn_dim ffn_hidden_size mlp_dim ff_dim dim_feedforward",
    "model.feed_forward": "activation activation_function hidden_act act mlp ffn",
    "model.tie_embeddings": "tie_word_embeddings weight_tying tie_weights tied tied_embeddings",
    "model.norm": "normalization norm_type layer_norm layernorm rmsnorm",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "model.position": "positional_encoding position_embedding position_embeddings pos_emb pos_embed positional rope",
    "model.dropout": "hidden_dropout resid_pdrop embd_pdrop dropout_rate drop p_drop dropout_prob",
    "model.init_from": "pretrained from_pretrained load_from base_model checkpoint_path init pretrained_model",
    "tokenizer.vocab_size": "vocab n_vocab vocabulary_size vocabulary vocabsize num_tokens_vocab",
    "tokenizer.kind": "tokenizer_type algorithm",
    "tokenizer.path": "tokenizer_path tokenizer_file",
    "data.train": "train_file train_files train_data train_path file files text source sources dataset datasets input corpus path",
    "data.heldout": "val valid validation eval_data dev val_file valid_file validation_file val_data validation_split val_split "
    "val_fraction val_size held_out holdout eval_file validation_data",
    "data.field": "text_column column text_field text_key column_name content_column text_col",
    "evaluation.every": "eval_every eval_interval eval_steps evaluation_steps eval_freq val_every val_interval eval_iters",
    "evaluation": "validate validator",
    "checkpoint.every": "save_every save_steps save_interval checkpoint_every ckpt_every save_freq checkpoint_interval",
    "checkpoint.keep": "save_total_limit keep_last max_checkpoints keep_checkpoints",
    "checkpoint": "checkpoints checkpointing save saving",
    "sampling.every": "sample_every sample_interval generate_every",
    "sampling.prompts": "prompt sample_prompt",
    "sampling": "sample samples generation generate",
    "seed": "random_seed random_state manual_seed rng_seed",
    "name": "run_name experiment experiment_name run title",
    "training": "train trainer train_args training_args",
}
"""What other programs call each recipe key."""

RECIPE_KEYS_IN_SECTION = {
    "evaluation.steps": "evaluation.every",
    "checkpoint.steps": "checkpoint.every",
    "sampling.steps": "sampling.every",
    "evaluation.interval": "evaluation.every",
    "checkpoint.interval": "checkpoint.every",
    "sampling.interval": "sampling.every",
    "evaluation.batch_size": "training.micro_batch_size",
    "sampling.max_tokens": "sampling.max_new_tokens",
    "sampling.length": "sampling.max_new_tokens",
    "tokenizer.type": "tokenizer.kind",
    "tokenizer.name": "tokenizer.kind",
    "tokenizer.model": "tokenizer.kind",
    "tokenizer.file": "tokenizer.path",
    "tokenizer.size": "tokenizer.vocab_size",
    "training.warmup": "training.schedule.warmup",
    "optimizer": "training.optimizer",
    "schedule": "training.schedule",
    "data.text": "data.train",
    "data.eval": "data.heldout",
    "data.column": "data.field",
}
"""Names whose meaning depends on the section in which they occur."""

RECIPE_ADVICE = {
    "gradient_accumulation_steps": "set training.micro_batch_size; a step has global_batch_size / micro_batch_size micro-batches",
    "grad_accum_steps": "set training.micro_batch_size; a step has global_batch_size / micro_batch_size micro-batches",
    "accumulate_grad_batches": "set training.micro_batch_size; a step has global_batch_size / micro_batch_size micro-batches",
    "device": "choose the device with --device",
    "devices": "start one process per device: torchrun --nproc-per-node N -m tinylm train RECIPE",
    "num_gpus": "start one process per device: torchrun --nproc-per-node N -m tinylm train RECIPE",
    "threads": "set the number with --threads",
    "num_workers": "set the number with --workers",
    "out": "choose the run folder with --out",
    "out_dir": "choose the run folder with --out",
    "output": "choose the run folder with --out",
    "output_dir": "choose the run folder with --out",
    "resume": "continue a run with --resume",
    "resume_from_checkpoint": "continue a run with --resume",
}
"""What to do instead of setting a key that does not exist."""

VALUES = {
    "fp16": "float16 half 16 f16 16-mixed torch.float16",
    "fp32": "float32 full single float 32 f32 32-true torch.float32",
    "bf16": "bfloat16 bf16-mixed torch.bfloat16",
    "auto": "automatic default mixed",
    "adamw": "adam adam_w adamw_torch",
    "cosine": "cosine_annealing cosine_decay cos cosine_with_warmup",
    "linear": "linear_decay linear_with_warmup polynomial",
    "constant": "fixed flat none constant_with_warmup",
    "wsd": "warmup_stable_decay trapezoidal",
    "layernorm": "layer_norm ln layer-norm",
    "rmsnorm": "rms_norm rms rms-norm",
    "pre": "pre_norm pre-norm prenorm before",
    "post": "post_norm post-norm postnorm after",
    "rope": "rotary rotary_embeddings rotary_embedding",
    "learned": "absolute learnable trainable",
    "sinusoidal": "sin sine sinusoid fixed sin_cos",
    "none": "off no nope null",
    "swiglu": "silu swish glu",
    "relu2": "relu_squared squared_relu relu^2",
    "gelu": "gelu_new gelu_fast gelu_pytorch_tanh",
    "gpt2": "gpt gpt-2 gpt_2",
    "llama": "llama2 llama3 llama-2 llama-3 llama3.1 llama3.2",
    "modern": "default nanochat",
    "decoder": "transformer gpt decoder_only decoder-only",
    "bpe": "byte_level_bpe bytelevelbpe byte-bpe bbpe tiktoken",
    "unigram": "sentencepiece sentence_piece spm",
    "wordpiece": "word_piece bert",
    "char": "character characters chars",
    "byte": "bytes utf-8 utf8",
    "word": "words whitespace",
    "file": "path",
    "tail": "end last suffix",
    "document": "documents random hash doc",
    "replace": "ignore lenient",
    "skipgram": "skip-gram skip_gram sg word2vec sgns",
    "cbow": "continuous_bag_of_words bag_of_words",
    "drop": "remove delete discard",
    "keep": "save",
    "windows": "window true",
    "documents": "document",
    "ddp": "distributed data_parallel",
    "fsdp": "fsdp2 sharded zero zero3",
    "last": "latest newest final recent end",
}
"""Other names for each value of a key or option."""

COMMANDS = {
    "train": "fit finetune fine-tune pretrain learn training run resume",
    "new": "init create make generate-recipe configure wizard start",
    "plan": "estimate cost check dry-run dryrun params flops memory",
    "recipes": "recipe presets templates examples configs",
    "sample": "generate gen complete infer inference predict prompt completion text-generation",
    "eval": "evaluate test ppl perplexity score validate benchmark bench evaluation harness",
    "compare": "diff cmp versus vs",
    "serve": "server api web ui host http openai",
    "export": "convert save gguf onnx hf to-hf push",
    "import": "load from-hf from_pretrained download pull",
    "runs": "list ls ps models status history show info",
    "plot": "graph chart curves draw figure",
    "tokenize": "tokenizer tokenise encode decode bpe vocab tokens",
    "embed": "embeddings embedding vectors word2vec glove w2v",
}
"""Other names for each command."""

OPTIONS = {
    "--prompt": "--text --input --start --question",
    "--max-new-tokens": "--max-tokens --max-length --length --tokens --num-tokens --max_length",
    "-n": "--num-samples --samples --n --count --number",
    "--temperature": "--temp -t",
    "--top-k": "--topk -k",
    "--top-p": "--topp --nucleus",
    "--run": "--model --ckpt --checkpoint-dir --model-path -m",
    "--device": "--gpu --cuda --cpu --accelerator",
    "--threads": "--num-threads --jobs -j --cores",
    "--out": "--output --output-dir --out-dir --save --destination -o",
    "--overwrite": "--force --replace -f --yes",
    "--quiet": "--silent",
    "--json": "--format-json --output-format",
    "--seed": "--random-seed",
    "--vocab-size": "--vocab --size --vocabulary",
    "--tokenizer": "--tok --tokeniser",
    "--set": "--override --option -D --config-override",
    "--stop-after": "--max-time --timeout --time-limit",
    "--stop": "--stop-sequence --eos --until",
    "--field": "--column --text-column --text-field --key",
    "--template": "--format-text --columns",
    "--minutes": "--time --duration",
    "--dimensions": "--dim --size --vector-size --dims",
    "--on": "--text --data --source",
    "--stride": "--step",
    "--context": "--context-length --block-size",
    "--resume": "--continue --resume-from",
    "--html": "--report",
}
"""Other names for each option. A hint suggests an option only if the command has it."""

ARGUMENTS = {
    "sample": "pass the text to continue with --prompt",
    "train": "to train on several texts, list them in a recipe; `tinylm new TEXT... --out my.yaml` writes the recipe",
    "plan": "change recipe keys with --set SECTION.KEY=VALUE",
    "eval": "specify the run with --run",
    "serve": "specify the run with --run",
    "plot": "specify the output file with --out",
    "export": "specify the run with --run",
    "import": "specify the run folder to create with --out",
}
"""What to do instead of passing an argument that the command does not accept."""


def _inverted(table: dict[str, str]) -> dict[str, list[str]]:
    inverted: dict[str, list[str]] = {}
    for known, others in table.items():
        for other in others.split():
            inverted.setdefault(other, []).append(known)
    return inverted


_KEY_OF, _VALUE_OF, _COMMAND_OF, _OPTION_OF = map(_inverted, (RECIPE_KEYS, VALUES, COMMANDS, OPTIONS))


def _normalized(name: str) -> str:
    """Convert a name to the notation of recipe keys: `Hidden-Size` and `hiddenSize` become `hidden_size`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(" ", "_").lower()


def recipe_key(path: tuple[str, ...], known: Collection[str]) -> str | None:
    """Return a hint for an unknown recipe key: the correct name, the correct section, or what to do instead.

    `known` contains the dotted paths of all keys and sections in the recipe.
    """
    name = _normalized(path[-1])
    section = ".".join((*path[:-1], name))
    if name in RECIPE_ADVICE and name not in known:
        return RECIPE_ADVICE[name]
    candidates = [RECIPE_KEYS_IN_SECTION.get(section, ""), *_KEY_OF.get(name, ())]
    elsewhere = [key for key in known if key.rpartition(".")[2] == name]
    candidates += elsewhere if len(elsewhere) == 1 else []
    prefix = ".".join(path[:-1])
    fitting = [key for key in candidates if key in known and key != ".".join(path)]
    fitting.sort(key=lambda key: not (prefix and key.startswith(prefix + ".")))  # keys in the same section first
    if not fitting:
        return None
    in_same_section = fitting[0].rpartition(".")[0] == prefix
    return f"did you mean {fitting[0].rpartition('.')[2] if in_same_section else fitting[0]}?"


def value(given: object, options: Iterable[str]) -> str | None:
    """Return a hint for a value that is not one of `options`."""
    options, text = list(options), str(given).strip()
    lower = text.lower()
    if lower in options:
        return f"did you mean {lower}?"
    meant = next((known for known in _VALUE_OF.get(lower, ()) if known in options), None)
    return f"did you mean {meant}?" if meant is not None else did_you_mean(text, options)


_NUMBER = re.compile(r"(?P<number>[0-9][0-9,_ ]*(?:\.[0-9]+)?|\.[0-9]+) *(?P<unit>[a-z%]*)", re.IGNORECASE)
_SIZES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "mil": 1e6, "million": 1e6, "b": 1e9, "g": 1e9, "bn": 1e9, "billion": 1e9}
_SECOND = 1 / 60
_EXPONENT = re.compile(r"[0-9.]+e[+-]?[0-9]+[a-z]*", re.IGNORECASE)
_MINUTES = {
    **{"s": _SECOND, "sec": _SECOND, "second": _SECOND, "seconds": _SECOND},
    **{"m": 1, "min": 1, "mins": 1, "minute": 1, "minutes": 1},
    **{"h": 60, "hr": 60, "hour": 60, "hours": 60},
}


def number(key: str, given: object) -> str | None:
    """Return a hint for a number with a unit, a percent sign or commas, such as `10M`, or `5m` for a key in minutes."""
    match = _NUMBER.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is None:
        return None
    plain, unit = float(re.sub("[,_ ]", "", match["number"])), match["unit"].lower()
    if unit == "%":
        scale = 0.01
    elif not unit:
        scale = 1.0
    else:
        units = {**_MINUTES, "d": 1440, "days": 1440} if key == "minutes" else _SIZES
        if unit not in units:
            return "write the number without a unit"
        scale = units[unit]
    return f"write {plain * scale:.12g}"


def duration_minutes(text: str) -> float | None:
    """Convert `90s`, `2m`, `1.5h` or a plain number of minutes to minutes. Return None for any other text."""
    match = _NUMBER.fullmatch(text.strip())
    scale = None if match is None else _MINUTES.get(match["unit"].lower() or "m")
    return None if match is None or scale is None else float(re.sub("[,_ ]", "", match["number"])) * scale


def positive_minutes(text: str, option: str) -> float:
    """Convert a positive duration to minutes, like `duration_minutes`. Raises `InputError` if `text` is not one."""
    minutes = duration_minutes(text)
    if minutes is None or minutes <= 0:
        hint = "a number of minutes, or 90s, 5m or 2h"
        if _EXPONENT.fullmatch(text.strip()):
            hint = f"write the number without an exponent: {hint}"
        raise InputError(f"must be a positive duration, not {text!r}", where=option, hint=hint)
    return minutes


def command(given: str, known: Iterable[str]) -> str | None:
    """Return a hint for an unknown command."""
    known = list(known)
    meant = next((name for name in _COMMAND_OF.get(given.lower().replace("_", "-"), ()) if name in known), None)
    return f"did you mean {meant}?" if meant is not None else did_you_mean(given, known)


def option(given: str, known: Collection[str]) -> str | None:
    """Return a hint for an option that the command does not have. `known` contains the command's options."""
    name = given.partition("=")[0]
    dashed = "-" + name.lstrip("-") if len(name.lstrip("-")) == 1 else "--" + name.lstrip("-").replace("_", "-").lower()
    if dashed in known:
        return f"did you mean {dashed}?"
    meant = next((other for spelling in (name, dashed) for other in _OPTION_OF.get(spelling, ()) if other in known), None)
    if meant is not None:
        return f"did you mean {meant}?"
    key_name = _normalized(name.lstrip("-"))
    keys = [key for key in RECIPE_KEYS if key.rpartition(".")[2] == key_name] + _KEY_OF.get(key_name, [])
    if "--set" in known and keys:
        return f"set it with --set {keys[0]}=VALUE"
    return did_you_mean(dashed, known)
