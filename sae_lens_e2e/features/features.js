"use strict";
(() => {
  const number = document.getElementById("number");
  let here = null;

  const leave = () => {
    here?.classList.remove("here");
    here = null;
    number.hidden = true;
  };

  // The number stands above its token, inside the window.
  const place = () => {
    if (!here) return;
    const token = here.getClientRects()[0], own = number.getBoundingClientRect();
    const above = token.top - own.height - 4;
    number.style.left = `${Math.max(4, Math.min(token.left, innerWidth - own.width - 4))}px`;
    number.style.top = `${above > 0 ? above : token.bottom + 4}px`;
  };

  const show = (token) => {
    leave();
    here = token;
    token.classList.add("here");
    // Who hears the number has to hear what it is of.
    const text = document.createElement("span");
    text.className = "unseen";
    text.textContent = `${token.textContent.trim()} `;
    number.replaceChildren(text, token.dataset.a);
    number.hidden = false;
    place();
  };

  const tokensOf = (element) => [...element.querySelectorAll(".on")];
  const peakOf = (passage) => passage.querySelector(".on:has(b)");

  // Left and right go from token to token, up and down from one passage's peak to another's.
  const go = (passages, along, down) => {
    const all = [...passages.querySelectorAll(".passage")];
    if (!here || !passages.contains(here)) return show(peakOf(all[0]));
    if (down) {
      const next = all.indexOf(here.closest(".passage")) + down;
      return show(peakOf(all[Math.max(0, Math.min(next, all.length - 1))]));
    }
    const tokens = tokensOf(passages);
    return show(tokens[Math.max(0, Math.min(tokens.indexOf(here) + along, tokens.length - 1))]);
  };

  const KEYS = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  for (const passages of document.querySelectorAll(".passages")) {
    passages.addEventListener("pointerover", (event) => {
      const token = event.target.closest(".on");
      if (token) show(token);
      else leave();
    });
    passages.addEventListener("pointerleave", leave);
    passages.addEventListener("focus", () => { if (passages.matches(":focus-visible")) go(passages, 0, 0); });
    passages.addEventListener("blur", leave);
    passages.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return leave();
      if (!(event.key in KEYS)) return;
      event.preventDefault();
      go(passages, ...KEYS[event.key]);
      here.scrollIntoView({ block: "nearest" });
    });
  }
  for (const moved of ["scroll", "resize"]) addEventListener(moved, place, { passive: true });
})();
