"""Answers as chat models write them: right ones in many forms, the same forms with wrong answers, and near misses."""
