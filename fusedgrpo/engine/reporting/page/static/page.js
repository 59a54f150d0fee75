"use strict";
/* What a page does beside its curves: theme, zoom by buttons, print, loading itself again. */
(() => {
  const root = document.documentElement;
  /* A page from a disk may have no storage: it then forgets. */
  const store = {
    get(kind, key) { try { return window[kind].getItem(`fusedgrpo ${key}`); } catch { return null; } },
    set(kind, key, value) { try { window[kind].setItem(`fusedgrpo ${key}`, value); } catch { /* */ } },
  };

  const themes = ["system", "light", "dark"];
  const button = document.getElementById("theme");
  function theme(name) {
    if (name === "system") delete root.dataset.theme;
    else root.dataset.theme = name;
    button.textContent = `Theme: ${name}`;
    button.dataset.now = name;
  }
  const before = store.get("localStorage", "theme");
  theme(themes.includes(before) ? before : "system");
  button.hidden = false;
  button.addEventListener("click", () => {
    theme(themes[(themes.indexOf(button.dataset.now) + 1) % themes.length]);
    store.set("localStorage", "theme", button.dataset.now);
    Charts.redraw();
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", Charts.redraw);

  const here = location.pathname;
  const kept = JSON.parse(store.get("sessionStorage", here) || "{}");
  document.querySelectorAll("details").forEach((details, i) => {
    if (kept.open && kept.open.includes(i)) details.open = true;
  });
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const spec of data.charts) Charts.make(spec);

  const controls = document.getElementById("controls");
  if (controls && Charts.all.length) {
    controls.hidden = false;
    const x = Charts.all[0].spec.x, first = x[0], last = x[x.length - 1];
    const parts = { all: 0, half: 0.5, tenth: 0.9 };
    controls.querySelectorAll("[data-part]").forEach((one) => one.addEventListener("click", () =>
      Charts.zoom(first + parts[one.dataset.part] * (last - first), last)));
    const mean = document.getElementById("mean");
    const smooth = () => {
      Charts.smoothOver(Number(mean.value));
      store.set("localStorage", "mean", mean.value);
    };
    const chosen = store.get("localStorage", "mean");
    if (chosen !== null && [...mean.options].some((o) => o.value === chosen)) {
      mean.value = chosen;
      if (mean.selectedIndex !== 1) smooth();
    }
    mean.addEventListener("change", smooth);
    Charts.zoomed.push((min, max) => {
      kept.zoom = min > first || max < last ? [min, max] : null;
    });
    if (kept.zoom) Charts.zoom(...kept.zoom);
  }

  /* On paper: light, and nothing folded. */
  let dark = null;
  window.addEventListener("beforeprint", () => {
    dark = root.dataset.theme || "";
    root.dataset.theme = "light";
    document.querySelectorAll("details:not([open])").forEach((one) => {
      one.open = true;
      one.dataset.folded = "";
    });
    Charts.redraw();
    Charts.drawRest();
  });
  window.addEventListener("afterprint", () => {
    if (dark) root.dataset.theme = dark;
    else delete root.dataset.theme;
    document.querySelectorAll("details[data-folded]").forEach((one) => {
      one.open = false;
      delete one.dataset.folded;
    });
    Charts.redraw();
  });

  /* Of a run that goes on. What one has opened and zoomed is as it was, the browser scrolls. */
  const seconds = Number(document.body.dataset.live || 0);
  if (seconds) {
    const pause = document.getElementById("pause");
    let paused = kept.paused === true, moved = 0;
    const say = () => {
      pause.hidden = false;
      pause.setAttribute("aria-pressed", String(paused));
      pause.textContent = paused ? "Loads no more: go on" : "Stop loading again";
    };
    pause.addEventListener("click", () => { paused = !paused; say(); });
    say();
    for (const event of ["pointermove", "pointerdown", "keydown", "wheel"])
      window.addEventListener(event, () => { moved = Date.now(); }, { passive: true });
    window.addEventListener("pagehide", () => {
      const open = [...document.querySelectorAll("details")].map((d, i) => (d.open ? i : -1));
      store.set("sessionStorage", here, JSON.stringify(
        { open: open.filter((i) => i >= 0), zoom: kept.zoom || null, paused }));
    });
    setInterval(() => {
      const busy = Date.now() - moved < 5000 || document.visibilityState !== "visible";
      if (!paused && !busy) location.reload();
    }, seconds * 1000);
  }
})();
