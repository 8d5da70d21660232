"""How long an answer may take. `make test` runs on busy machines and forgives much; TRIVIUM_STRICT_TIMES=1 does not."""

from __future__ import annotations

import os

IS_STRICT = os.environ.get("TRIVIUM_STRICT_TIMES") == "1"
ANSWER_S = 1.0 if IS_STRICT else 10.0
TEMPLATE_S = 1.5 if IS_STRICT else 10.0  # to refuse a chat whose template never ends
GRAMMAR_S = 2.5 if IS_STRICT else 15.0  # to refuse one that would never end
