"""Questions to an index. For programs: `Index.open(folder).search("a red bird")`, see `docs/search.md`."""

from pipeline.search.answer import Found, Hit
from pipeline.search.index import Index
from pipeline.search.query import Query, QueryError, Term, UnknownName
from pipeline.search.where import Where

__all__ = ["Found", "Hit", "Index", "Query", "QueryError", "Term", "UnknownName", "Where"]
