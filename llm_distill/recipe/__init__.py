"""Recipes: a run as one YAML file.

The one rule: *a component is a name, or a name with arguments.* A name is what its field offers
(``weight``: `llm_distill.schedules`, ``layers``: `llm_distill.layers`, ``projector``:
`llm_distill.projectors`, ``heads``: `llm_distill.heads`, ``loss``: `llm_distill.losses`,
``keep``: `llm_distill.cache.estimators`), else
anything that ``import llm_distill`` exports, else ``package.module:name``, which needs
``--allow-code package.module`` on the command line. ::

    forward_kl            ->  forward_kl
    jsd: {beta: 0.1}      ->  partial(jsd, beta=0.1)
    Logits: {loss: jsd}   ->  Logits(loss=jsd)

Sections:

* ``student``: a Hub id, a path, ``Local``, ``FromConfig`` or ``FromTeacher``.
* ``teacher``: a Hub id, a path, ``Local`` or ``Cached``.
* ``data``: the fields of `llm_distill.Data`.
* ``objectives``: a list of components; by default cross-entropy (0.1) and forward KL on the logits.
* ``balance``: how their weights move, by a name of `llm_distill.balance`; by default as written.
* ``training``: `transformers.TrainingArguments`, nothing renamed. By default ``output_dir`` is
  ``out/<name of the recipe>``, ``report_to`` none and ``logging_steps`` 10.
* ``peft``: `peft.LoraConfig`, to train an adapter instead of the whole student. By default there
  is none.
* ``rows_per_chunk``: rows whose logits exist at a time; by default as memory allows.

The YAML is that of version 1.2 where 1.1 surprises: ``1e-5`` is a number, ``no`` and dates are
text. A key that stands twice is an error.
"""

from llm_distill.recipe.sections import Recipe

__all__ = ["Recipe"]
