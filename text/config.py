"""What a checkpoint's directory says of its tokenizer beside the tokenizer's own file."""

from dataclasses import dataclass, field

from common.files import UsageError, read_json, read_text

FILE, HF_FILE, HF_CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE, GENERATION = "chat_template.jinja", "generation_config.json"


@dataclass
class TokenizerConfig:
    """chat_format: what our own exports say. template: Jinja, read from `where`. tokens: the template's
    variables, such as eos_token. stop_ids: of the generation config. added: name -> id. model_type: that of
    config.json."""

    chat_format: str | None = None
    template: str | None = None
    where: str = ""
    tokens: dict = field(default_factory=dict)
    stop_ids: list = field(default_factory=list)
    added: dict = field(default_factory=dict)
    model_type: str | None = None


def read_config(file):
    """The TokenizerConfig of the directory that a tokenizer's file stands in; UsageError where it is
    damaged."""
    found = {
        name: read_json(file.with_name(name)) if file.with_name(name).is_file() else {}
        for name in (HF_CONFIG, GENERATION, "added_tokens.json", "config.json")
    }
    hf, stops = found[HF_CONFIG], found[GENERATION].get("eos_token_id")
    config = TokenizerConfig(hf.get("chat_format"), model_type=found["config.json"].get("model_type"))
    try:
        stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
        if not all(type(i) is int for i in stops):
            raise TypeError(f"{GENERATION}: eos_token_id {stops}")
        config.stop_ids = stops
        config.added = {
            token["content"]: int(i) for i, token in (hf.get("added_tokens_decoder") or {}).items()
        }
        config.added |= {name: int(i) for name, i in found["added_tokens.json"].items()}
        beside = file.with_name(HF_FILE)
        if file.name != HF_FILE and beside.is_file():
            tokens = read_json(beside).get("added_tokens") or []
            config.added |= {token["content"]: int(token["id"]) for token in tokens}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = hf.get(name)
            if token := token.get("content") if isinstance(token, dict) else token:
                config.tokens[name] = str(token)
        config.template, config.where = hf.get("chat_template"), str(file.with_name(HF_CONFIG))
        if isinstance(config.template, list):
            named = {template["name"]: template["template"] for template in config.template}
            config.template = named.get("default")
        if config.template is not None and not isinstance(config.template, str):
            raise TypeError(f"{HF_CONFIG}: chat_template is not a string")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{file.parent}: a value that is not as it should be ({error!r})") from None
    if (own := file.with_name(TEMPLATE_FILE)).is_file():
        config.template, config.where = read_text(own), str(own)
    return config
