"use strict";
// While a run trains: the page is loaded anew when what it shows has changed.

setInterval(async () => {
  const answer = await fetch("version").catch(() => null); // the server may have ended
  const version = answer?.ok ? await answer.text() : data.version;
  const isBusy = ["INPUT", "SELECT"].includes(document.activeElement?.tagName);
  if (version !== data.version && !isBusy) location.reload();
}, 2000);
