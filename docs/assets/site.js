// Names for what the theme leaves unnamed, so that screen readers can tell it.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const name = () => document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  name();
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
});
