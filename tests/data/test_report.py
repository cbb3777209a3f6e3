import torch
from datasets import Dataset

from llm_distill.data import Counter, Report
from llm_distill.data.report import Counts


def test_a_report_is_a_sentence() -> None:
    report = Report(
        examples=12345,
        truncated=3,
        dropped=2,
        tokens=1234567,
        supervised_tokens=800000,
        max_length=1024,
    )
    assert str(report) == (
        "12,345 examples: 3 truncated at 1,024 tokens, 2 dropped (empty, or nothing supervised); "
        "1,234,567 tokens, 800,000 of them supervised"
    )


def test_the_sentence_says_what_was_held_out_and_what_is_a_stream() -> None:
    counts = Counts(examples=1, truncated=0, dropped=0, tokens=1, supervised_tokens=0)
    held = Report(**counts._asdict(), max_length=None, held_out=1)
    assert "1 example: 0 truncated, 0 dropped" in str(held)
    assert "supervised), 1 held out for evaluation; 1 token, 0" in str(held)
    stream = Report(**counts._asdict(), max_length=None, stream=True)
    assert str(stream).startswith("1 example of a stream: ")


def test_a_counter_adds_up_batches() -> None:
    counter = Counter(8)
    for _ in range(2):
        counter.add(Counts(examples=3, truncated=1, dropped=2, tokens=10, supervised_tokens=5))
    assert counter.report() == Report(
        examples=6,
        truncated=2,
        dropped=4,
        tokens=20,
        supervised_tokens=10,
        max_length=8,
        stream=True,
    )


def count_one(row: dict[str, int], counter: Counter) -> dict[str, int]:
    counter.add(Counts(examples=1, truncated=0, dropped=0, tokens=row["n"], supervised_tokens=0))
    return row


def test_a_counter_sees_what_dataloader_workers_count() -> None:
    counter = Counter(None)
    rows = Dataset.from_dict({"n": list(range(8))}).to_iterable_dataset(num_shards=2)
    counted = rows.map(count_one, fn_kwargs={"counter": counter})
    loader = torch.utils.data.DataLoader(counted, num_workers=2)
    assert sum(1 for _ in loader) == 8
    assert counter.report().examples == 8
    assert counter.report().tokens == sum(range(8))
