"""What a teacher said, on disk: estimators, the codec, Parquet shards, manifest and index.

```text
estimators · kinds      what is kept of a distribution, and read back
columns · planes · levels   as bytes
shards · index · manifest   the files: a row for each example, found by its key
facts                   label log-probabilities and entropies, read back
store                   reading: verified, at any place, in any order
```
"""
