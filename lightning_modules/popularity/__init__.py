"""Popularity and chance."""

from lightning_modules.popularity.module import (
    PopularityModule,
    RandomModule,
    RecentPopularityModule,
)

__all__ = ["PopularityModule", "RandomModule", "RecentPopularityModule"]
