"""Popularity, chance, and the share of what a user liked."""

from lightning_modules.popularity.module import (
    LikedFractionModule,
    PopularityModule,
    RandomModule,
    RecentPopularityModule,
)

__all__ = ["LikedFractionModule", "PopularityModule", "RandomModule", "RecentPopularityModule"]
