// Names for what the theme leaves unnamed, so that screen readers can tell it.
document$.subscribe(() => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  const name = () => document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  // A table that is wider than the page is scrolled with the keyboard too.
  const reach = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach((wrap, i) => {
    if (wrap.scrollWidth <= wrap.clientWidth) return wrap.removeAttribute("tabindex");
    Object.entries({ tabindex: 0, role: "region", "aria-label": `Table ${i + 1}` }).forEach(([key, value]) => wrap.setAttribute(key, value));
  });
  name();
  reach();
  addEventListener("resize", reach);
  new MutationObserver(() => { name(); reach(); }).observe(document.body, { childList: true, subtree: true });
});
