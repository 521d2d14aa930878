"""Values that may be secrets stand in no record and no message."""

import pytest
from lora_capacity_profiling.endpoint import Endpoint
from lora_capacity_profiling.secrets import command_without_secrets, without_secrets, without_user

from lora_capacity.errors import InputError


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "api_key", "api-key", "DB_PASS", "PGPASSWORD", "AWS_SECRET_ACCESS_KEY", "OAUTH", "DB_PWD"]
)
def test_what_may_be_a_secret_is_left_out(name: str) -> None:
    assert "hush" not in str(without_secrets({name: "hush", "other": "x"}))
    assert without_secrets({name: "hush", "other": "x"})["other"] == "x"
    for words in (["--flag", f"{name}=hush"], [f"--env={name}=hush"], [f"--flag=--{name}=hush"], [f"--{name}", "hush"]):
        assert "hush" not in " ".join(command_without_secrets(["profile", *words]))


def test_what_is_none_stays() -> None:
    flags = {"max_num_batched_tokens": 2048, "tokenizer": "x", "tokenizer_mode": "auto", "author": "y"}
    assert without_secrets(flags) == flags
    words = ["serve", "m", "--max-num-batched-tokens", "2048", "--flag", "dtype=auto", "--env", "A=b=c"]
    assert command_without_secrets(words) == words


def test_addresses_name_no_user() -> None:
    assert without_user("--url=https://me:hush@host:1/x y") == "--url=https://(secret)@host:1/x y"
    for url in ("http://me:hush@host:8000", "ftp://me:hush@host", "http://me:hush@host:port"):
        with pytest.raises(InputError, match="url: ") as caught:
            Endpoint.from_url(url)
        assert "hush" not in str(caught.value)
