"""What is found in folders: read, refused or told, and each file once."""

from __future__ import annotations

import warnings

import pytest
from text_files import compressed, dataset, write_json_lines, write_table

from drope_kernels.recalibrate import read_documents


def test_what_lies_beside_a_readme_is_read(tmp_path):
    (tmp_path / "README.md").write_text("A card.")
    write_json_lines(tmp_path / "a.json", ["one"])
    compressed(tmp_path / "a.json")
    write_table(tmp_path / "b.csv", ["two"])
    compressed(write_json_lines(tmp_path / "c.jsonl", ["three"]), ".zst")
    assert [one.text for one in read_documents(tmp_path)] == ["A card.", "one", "two", "three"]


@pytest.mark.parametrize("name", ["deep/a.zip", "a.HTML", "a.parquet.gz", "a.txt.lz4", "a.log.gz"])
def test_what_lies_beside_a_readme_and_cannot_be_read_is_refused(tmp_path, name):
    (tmp_path / "README.md").write_text("A card.")
    (tmp_path / "deep").mkdir()
    (tmp_path / name).touch()
    (tmp_path / "z.arrow").touch()
    with pytest.raises(ValueError, match=f"got .*{name} and 1 more, which would not be read"):
        read_documents(tmp_path)
    (tmp_path / "z.arrow").unlink()
    with pytest.raises(ValueError, match=f"got .*{name}, which would not be read; convert it"):
        read_documents(tmp_path)


def test_a_file_that_is_named_twice_is_told_with_its_share(tmp_path):
    for name, size in (("a.txt", 30), ("b.txt", 40)):
        (tmp_path / name).write_text("x" * size)
    (tmp_path / "c.txt").symlink_to("a.txt")
    made = dataset(["live"])
    for sources, number, share in (
        ([tmp_path / "a.txt", tmp_path / "a.txt", tmp_path / "b.txt"], 3, ", 30% of the bytes"),
        (tmp_path, 3, ", 30% of the bytes"),  # by another name
        ([tmp_path / "b.txt", f"{tmp_path}/./b.txt"], 2, ", 50% of the bytes"),
        ([made, made], 2, ""),
    ):
        with pytest.warns(UserWarning, match=f"named more than once and read as often{share};"):
            documents = read_documents(sources)
        assert len(list(documents)) == number
    (tmp_path / "c.txt").unlink()
    (tmp_path / "c.txt").write_text("x" * 30)  # the same content is another file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_documents([tmp_path, made])


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "two.txt").write_text("two")
    assert [one.text for one in read_documents(tmp_path)] == ["one", "two"]
    other = tmp_path / "other"  # a link to another folder is followed
    other.mkdir()
    (other / "c").symlink_to(tmp_path / "a", target_is_directory=True)
    assert sorted(one.text for one in read_documents(other)) == ["one", "two"]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (tmp_path / name).write_text(pointer)
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=f"{name}: expected texts, got git-lfs's pointer"):
            read_documents(source)
    (tmp_path / name).unlink()
    (tmp_path / "b.txt").write_text("On " + pointer)
    assert len(list(read_documents(tmp_path))) == 1
