from pathlib import Path

import numpy as np
import pytest

from lora_capacity.errors import InputError
from lora_capacity.tables import Column, read_table

COLUMNS = {
    "name": Column("text"),
    "rate_per_s": Column(minimum=0, exclusive=True),
    "rank": Column("integer", blank=True, minimum=1),
    "note": Column("text", required=False),
    "share": Column(required=False, minimum=0),
}


def table(folder: Path, content: str | bytes) -> Path:
    path = folder / "table.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_columns_come_back_as_arrays_in_row_order(tmp_path: Path) -> None:
    read = read_table(table(tmp_path, "rank,unused,name,rate_per_s\n8,x, a ,0.5\n,y,b,2e-1\n"), COLUMNS)
    assert list(read) == list(COLUMNS)
    assert read["name"].tolist() == ["a", "b"]
    assert read["rate_per_s"].tolist() == [0.5, 0.2]
    assert read["rate_per_s"].dtype == np.float64
    np.testing.assert_array_equal(read["rank"], [8, np.nan])
    assert read["note"].tolist() == ["", ""]
    assert np.isnan(read["share"]).all()


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    read = read_table(table(tmp_path, b"\xef\xbb\xbfname,rate_per_s,rank\r\na,1,8\r\n"), COLUMNS)
    assert (read["name"][0], read["rank"][0]) == ("a", 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "'columns none' is not allowed; allowed: a table with a column 'name'"),
        ("name,rank\na,8\n", "'columns name, rank' is not allowed; allowed: a table with a column 'rate_per_s'"),
        ("name,rank,rate\na,8,1\n", "a column 'rate_per_s'; did you mean 'rate'?"),
        ("name,rank,rate_per_s\n", "'no rows' is not allowed; allowed: at least one row"),
        ("name,rate_per_s,rank\na,1,8\n,1,8\n", " line 3, name: '' is not allowed; allowed: text"),
        ("name,rate_per_s,rank\na,fast,8\n", " line 2, rate_per_s: 'fast' is not allowed; allowed: a number > 0"),
        ("name,rate_per_s,rank\na,0,8\n", " line 2, rate_per_s: '0' is not allowed; allowed: a number > 0"),
        ("name,rate_per_s,rank\na,inf,8\n", " line 2, rate_per_s: 'inf' is not allowed"),
        ("name,rate_per_s,rank\na,nan,8\n", " line 2, rate_per_s: 'nan' is not allowed"),
        ("name,rate_per_s,rank\na,,8\n", " line 2, rate_per_s: '' is not allowed; allowed: a number > 0"),
        (
            "name,rate_per_s,rank\na,1,8.5\n",
            " line 2, rank: '8.5' is not allowed; allowed: a whole number >= 1 or empty",
        ),
        ("name,rate_per_s,rank\na,1,0\n", " line 2, rank: '0' is not allowed"),
        ("name,rate_per_s,rank,share\na,1,8,-1\n", " line 2, share: '-1' is not allowed; allowed: a number >= 0"),
        ("name,rate_per_s,rank\na\n", " line 2, rate_per_s: '' is not allowed"),
        ('name,rate_per_s,rank\n"a\nb",x,8\n', " line 3, rate_per_s: 'x' is not allowed"),
        (b"name,rate_per_s,rank\n\xff,1,8\n", "allowed: a readable CSV file"),
    ],
)
def test_a_complaint_names_file_line_and_column_in_one_line(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = table(tmp_path, content)
    with pytest.raises(InputError) as caught:
        read_table(path, COLUMNS)
    assert str(caught.value).startswith(str(path))
    assert words in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_that_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"file not found: .*absent\.csv"):
        read_table(tmp_path / "absent.csv", COLUMNS)
    with pytest.raises(InputError, match="'a folder'"):
        read_table(tmp_path, COLUMNS)
