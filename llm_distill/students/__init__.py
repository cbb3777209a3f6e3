"""Students: a loaded model, an id or path, random weights, or some blocks of the teacher."""

from llm_distill.students.from_config import FromConfig
from llm_distill.students.from_teacher import FromTeacher
from llm_distill.students.given import (
    Made,
    Student,
    as_local,
    both_causal,
    head_name,
    load_student,
    refuse_adapted_head,
    student_spec,
    teacher_for,
)

__all__ = [
    "FromConfig",
    "FromTeacher",
    "Made",
    "Student",
    "as_local",
    "both_causal",
    "head_name",
    "load_student",
    "refuse_adapted_head",
    "student_spec",
    "teacher_for",
]
