"use strict";
(() => {
  const root = document.documentElement;
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  root.classList.add("scripted");

  // Colours: as the system has them, or the other way round.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const themeButton = document.querySelector(".theme");
  themeButton.addEventListener("click", () => {
    const now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    themeButton.setAttribute("aria-label", `Colours: ${root.dataset.theme}`);
  });

  // The command, to the clipboard.
  const copy = document.querySelector(".command button");
  copy.addEventListener("click", async () => {
    const command = document.querySelector(".command pre");
    try {
      await navigator.clipboard.writeText(command.textContent);
      copy.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(command);
      copy.textContent = "Selected";
    }
  });

  // The map: which number its colours show, and which configuration is told beside it.
  const maps = all(".map");
  const cells = maps.map((map) => all(".cells rect", map));
  const told = document.querySelector(".readout");
  let metric = 0;
  let place = data.best;

  const colour = () => {
    const shown = data.metrics[metric];
    maps.forEach((map, which) => {
      for (const cell of cells[which]) {
        const code = shown.codes[cell.dataset.i];
        cell.setAttribute("class", code === "." ? "none" : `c${parseInt(code, 36)}`);
      }
      map.querySelector(".legend-name").textContent = shown.title;
      map.querySelector(".legend-ticks").innerHTML = shown.ticks[which];
      map.querySelector(".limit.bound").setAttribute("d", shown.bound[which + 1]);
      map.querySelector(".note.bound").textContent = shown.bound[0] && `dashed: ${shown.bound[0]}`;
    });
    tell(place);
  };

  const tell = (index) => {
    place = index;
    const row = Math.floor(index / data.adapters.length), column = index % data.adapters.length;
    told.querySelector("h3").textContent = `${data.adapters[column]} adapters, ${data.slots[row]} slots`;
    told.querySelector(".verdict").textContent = data.verdicts[index];
    data.metrics.forEach((each, i) => {
      const value = told.querySelector(`[data-metric="${each.key}"]`);
      value.textContent = each.text[index];
      for (const part of [value, value.previousElementSibling]) part.classList.toggle("on", i === metric);
    });
    maps.forEach((map, which) => {
      const cell = cells[which].find((each) => Number(each.dataset.i) === index);
      const cursor = map.querySelector(".cursor");
      for (const side of ["x", "y", "width", "height"]) cursor.setAttribute(side, cell.getAttribute(side));
      cursor.style.visibility = index === data.best ? "hidden" : "visible";
    });
  };

  for (const input of all(".metrics input")) {
    input.addEventListener("change", () => { metric = Number(input.value); colour(); });
  }
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  for (const map of maps) {
    map.addEventListener("pointermove", (event) => {
      if (event.target.dataset.i !== undefined) tell(Number(event.target.dataset.i));
    });
    map.addEventListener("pointerdown", (event) => {
      if (event.target.dataset.i !== undefined) tell(Number(event.target.dataset.i));
    });
    map.addEventListener("pointerleave", () => tell(data.best));
    map.addEventListener("keydown", (event) => {
      if (event.key === "Home" || event.key === "Escape") return tell(data.best);
      if (!(event.key in moves)) return;
      event.preventDefault();
      const width = data.adapters.length;
      const [dx, dy] = moves[event.key];
      const column = (place % width) + dx, row = Math.floor(place / width) + dy;
      const index = row * width + column;
      if (column >= 0 && column < width && row >= 0 && row < data.slots.length && data.verdicts[index]) tell(index);
    });
  }

  // The curves: one hair line through all that are drawn against the same, and the values where it stands.
  const panels = all(".panel");
  const tips = panels.map((panel) => {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    tip.setAttribute("aria-hidden", "true");
    document.body.append(tip);
    return tip;
  });
  const hideTips = () => panels.forEach((panel, i) => { tips[i].hidden = true; panel.querySelector(".hover").style.visibility = ""; });
  const follow = (group, index) => panels.forEach((panel, i) => {
    if (panel.dataset.group !== group) return;
    const { places, text, at } = data.panels[panel.dataset.key];
    const [x, y] = places[index];
    const box = panel.getBoundingClientRect();
    const zoom = box.width / panel.viewBox.baseVal.width;
    if (y < 0) { tips[i].hidden = true; return; }
    panel.querySelector(".hair").setAttribute("d", `M${x} 30V${panel.viewBox.baseVal.height - 44}`);
    const dot = panel.querySelector(".hover .dot");
    dot.setAttribute("cx", x);
    dot.setAttribute("cy", y);
    panel.querySelector(".hover").style.visibility = "visible";
    tips[i].textContent = `${at[index]}: ${text[index]}`;
    tips[i].hidden = false;
    const half = tips[i].offsetWidth / 2 + 4;
    const left = Math.min(Math.max(box.left + x * zoom, half), root.clientWidth - half);
    tips[i].style.left = `${left + scrollX}px`;
    tips[i].style.top = `${box.top + scrollY + y * zoom}px`;
  });
  for (const panel of panels) {
    panel.addEventListener("pointermove", (event) => {
      const box = panel.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * panel.viewBox.baseVal.width;
      const { places } = data.panels[panel.dataset.key];
      let nearest = 0;
      places.forEach(([at], i) => { if (Math.abs(at - x) < Math.abs(places[nearest][0] - x)) nearest = i; });
      follow(panel.dataset.group, nearest);
    });
    panel.addEventListener("pointerleave", hideTips);
  }
  addEventListener("scroll", hideTips, { passive: true });
  colour();
})();
