"use strict";
for (const slider of document.querySelectorAll(".slider")) {
  const input = slider.querySelector("input");
  const show = () => {
    slider.style.setProperty("--at", input.value + "%");
    input.setAttribute("aria-valuetext", input.value + " % source");
  };
  input.addEventListener("input", show);
  show(); // a reloaded page keeps the value of the input
}
for (const button of document.querySelectorAll(".copy")) {
  const code = button.parentElement.querySelector("code");
  button.hidden = false;
  button.addEventListener("click", async () => {
    let copied = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // No clipboard for this page: select the text, which older browsers can copy.
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
}
